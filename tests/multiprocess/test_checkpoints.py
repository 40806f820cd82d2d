"""A resumed run equals an unbroken one: bit by bit at the same world size, closely at any other and at any stage."""

import json
from pathlib import Path

import pytest
import torch
from launching import Launcher

from sltscale.engine.checkpoint import assemble, latest_checkpoint
from sltscale.errors import InputError

pytestmark = pytest.mark.multiprocess
WORKER = Path(__file__).with_name("steps_worker.py")


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found, complaints = latest_checkpoint(folder / "checkpoints")
    assert found is not None, complaints
    return assemble(found)


def test_resume_is_bit_equal_at_every_stage_with_dropout_and_two_learning_rates(
    launcher: Launcher, tmp_path: Path
) -> None:
    common = ["--clip_norm", "0.5", "--optimizer", "adamw", "--dropout", "0.1"]
    launcher.check(WORKER, [*common, "--steps", "5", "--out", str(tmp_path / "unbroken")], ranks=2)
    launcher.check(WORKER, [*common, "--steps", "3", "--out", str(tmp_path / "first")], ranks=2)
    for stage in range(4):
        first = tmp_path / f"first/zero{stage}/checkpoints"
        arguments = [*common, "--steps", "2", "--stages", str(stage), "--resume", str(first)]
        launcher.check(WORKER, [*arguments, "--out", str(tmp_path / "second")], ranks=2)
        unbroken, second = tmp_path / f"unbroken/zero{stage}", tmp_path / f"second/zero{stage}"
        expected = losses(unbroken)
        assert losses(second) == {step: expected[step] for step in (3, 4)}
        ours, reference = weights(second), weights(unbroken)
        assert all(torch.equal(ours[name], reference[name]) for name in reference)


def test_resume_at_another_world_size_and_stage(launcher: Launcher, tmp_path: Path) -> None:
    common = ["--clip_norm", "0.5", "--optimizer", "adamw"]
    launcher.check(WORKER, [*common, "--steps", "3", "--stages", "2", "--out", str(tmp_path / "first")], ranks=2)
    launcher.check(WORKER, [*common, "--steps", "6", "--stages", "0", "--out", str(tmp_path / "unbroken")], ranks=1)
    expected = losses(tmp_path / "unbroken/zero0")
    for ranks, stages in ((1, "1,3"), (3, "0,2")):
        arguments = [*common, "--steps", "3", "--stages", stages, "--resume", str(tmp_path / "first/zero2/checkpoints")]
        launcher.check(WORKER, [*arguments, "--out", str(tmp_path / f"ranks{ranks}")], ranks=ranks)
        for stage in stages.split(","):
            resumed = losses(tmp_path / f"ranks{ranks}/zero{stage}")
            assert sorted(resumed) == [3, 4, 5]
            for step, loss in resumed.items():
                assert loss == pytest.approx(expected[step], rel=1e-4)


@pytest.fixture
def two_checkpoints(launcher: Launcher, tmp_path: Path) -> Path:
    first = ["--steps", "1", "--stages", "1", "--out", str(tmp_path)]
    launcher.check(WORKER, first, ranks=2)
    launcher.check(WORKER, [*first, "--resume", str(tmp_path / "zero1/checkpoints")], ranks=2)
    return tmp_path / "zero1/checkpoints"


def test_damage_is_found_and_the_checkpoint_before_is_used(two_checkpoints: Path) -> None:
    newest = two_checkpoints / "step-00000002"
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        found, complaints = latest_checkpoint(two_checkpoints)
        if path.suffix == ".safetensors":
            assert path.name in complaints[0]
        assert found is not None
        assert found.step == 1, path
        path.write_bytes(content)
    (newest / "rank-00001.safetensors").unlink()
    found, complaints = latest_checkpoint(two_checkpoints)
    assert found is not None
    assert found.step == 1
    assert "rank-00001.safetensors has None bytes" in complaints[0]
    for path in (two_checkpoints / "step-00000001").glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint is whole"):
        latest_checkpoint(two_checkpoints)


def test_incomplete_files_are_refused_by_parameter(two_checkpoints: Path) -> None:
    found, _ = latest_checkpoint(two_checkpoints)
    assert found is not None
    del found.manifest["files"]["rank-00001.safetensors"]
    with pytest.raises(InputError, match="elements of weights/"):
        assemble(found)
