"""A resumed run equals an unbroken one: bit by bit at the same world size, closely at any other and at any stage."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launching import Launcher
from safetensors.torch import load_file

from sltscale.data.text import build_corpus_tokenizer
from sltscale.engine import manifest
from sltscale.engine.checkpoint import assemble, latest_checkpoint
from sltscale.engine.manifest import read_manifest, verify
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


@pytest.mark.slow
def test_resume_is_bit_equal_at_every_stage_with_dropout_and_two_learning_rates(
    launcher: Launcher, tmp_path: Path
) -> None:
    common = ["--clip_norm", "0.5", "--optimizer", "adamw", "--dropout", "0.1"]
    launcher.check(WORKER, [*common, "--steps", "5", "--out", str(tmp_path / "unbroken")], ranks=2)
    launcher.check(WORKER, [*common, "--steps", "3", "--out", str(tmp_path / "first")], ranks=2)
    for stage in range(4):
        first = tmp_path / f"first/whole/zero{stage}/checkpoints"
        arguments = [*common, "--steps", "2", "--stages", str(stage), "--resume", str(first)]
        launcher.check(WORKER, [*arguments, "--out", str(tmp_path / "second")], ranks=2)
        unbroken, second = tmp_path / f"unbroken/whole/zero{stage}", tmp_path / f"second/whole/zero{stage}"
        expected = losses(unbroken)
        assert losses(second) == {step: expected[step] for step in (3, 4)}
        ours, reference = weights(second), weights(unbroken)
        assert all(torch.equal(ours[name], reference[name]) for name in reference)


def test_resume_at_another_world_size_and_stage(launcher: Launcher, tmp_path: Path) -> None:
    common = ["--clip_norm", "0.5", "--optimizer", "adamw"]
    launcher.check(WORKER, [*common, "--steps", "3", "--stages", "2", "--out", str(tmp_path / "first")], ranks=2)
    launcher.check(WORKER, [*common, "--steps", "6", "--stages", "0", "--out", str(tmp_path / "unbroken")], ranks=1)
    expected = losses(tmp_path / "unbroken/whole/zero0")
    for ranks, stages in ((1, "1,3"), (3, "0,2")):
        arguments = [
            *common,
            "--steps",
            "3",
            "--stages",
            stages,
            "--resume",
            str(tmp_path / "first/whole/zero2/checkpoints"),
        ]
        launcher.check(WORKER, [*arguments, "--out", str(tmp_path / f"ranks{ranks}")], ranks=ranks)
        for stage in stages.split(","):
            resumed = losses(tmp_path / f"ranks{ranks}/whole/zero{stage}")
            assert sorted(resumed) == [3, 4, 5]
            for step, loss in resumed.items():
                assert loss == pytest.approx(expected[step], rel=1e-4)


@pytest.fixture(scope="module")
def made(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of stage 1 with checkpoints of steps 1 and 2."""
    launcher, run = Launcher(environment), tmp_path_factory.mktemp("made")
    first = ["--steps", "1", "--stages", "1", "--out", str(run)]
    try:
        launcher.check(WORKER, first, ranks=2)
        launcher.check(WORKER, [*first, "--resume", str(run / "whole/zero1/checkpoints")], ranks=2)
        yield run / "whole/zero1"
    finally:
        launcher.end()


@pytest.fixture
def two_checkpoints(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made/checkpoints"


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
    assert "rank-00001.safetensors is missing" in complaints[0]
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


def test_one_flipped_bit_anywhere_in_a_manifest_is_found(two_checkpoints: Path) -> None:
    path = two_checkpoints / "step-00000002/MANIFEST.json"
    content = path.read_bytes()
    positions = sorted({*range(0, len(content), 97), content.index(b'"step"') + 8, content.index(b'"scalars"') + 40})
    for position in positions:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        found, complaints = latest_checkpoint(two_checkpoints)
        assert found is not None
        assert found.step == 1, position
        assert complaints[0].startswith("checkpoint step-00000002: ")


def test_a_newer_format_is_refused_and_not_gone_back_behind(two_checkpoints: Path) -> None:
    newest = two_checkpoints / "step-00000002"
    content = json.loads((newest / "MANIFEST.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)  # what that version would have written
        manifest.write_manifest(
            newest, {key: value for key, value in content.items() if key not in ("format", "sha256")}
        )
    with pytest.raises(InputError, match=r"step-00000002: format 3, this version reads 2; it was written by sltscale"):
        latest_checkpoint(two_checkpoints)


def test_a_checkpoint_of_another_recipe_names_the_fields(two_checkpoints: Path) -> None:
    found, _ = latest_checkpoint(two_checkpoints)
    assert found is not None
    stored = manifest.recipe_from_json(json.dumps(found.manifest["recipe"]), "here")
    manifest.check_recipe(found, stored)
    tree = stored.model_dump()
    tree["optim"]["lr"] = 0.25
    with pytest.raises(InputError, match=r"written by another configuration: optim\.lr 0\.2 \(run\) / 0\.25 \(asked\)"):
        manifest.check_recipe(found, stored.model_validate(tree))


def test_the_checkpoint_command(
    two_checkpoints: Path, tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = two_checkpoints.parent
    recipe = json.dumps(read_manifest(two_checkpoints / "step-00000002").manifest["recipe"])
    (run / "config.json").write_text(recipe)
    build_corpus_tokenizer(["morgen kommt der regen"] * 9, ["de"], 30).save(run / "tokenizer")
    sltscale = ("-m", "sltscale.cli", "checkpoint")
    done = command(*sltscale, "verify", run)
    assert (done.returncode, done.stdout.count(": whole")) == (0, 2), done.stderr
    shown = command(*sltscale, "show", run).stdout
    assert [line.split()[:3] for line in shown.splitlines() if line.split()[0] in "12"] == [
        ["1", "2", "1"],
        ["2", "2", "1"],
    ]
    done = command(*sltscale, "convert", run, "--step", "1", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    first = assemble(verify(two_checkpoints / "step-00000001"))
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == first.keys()
    assert all(torch.equal(exported[name], first[name]) for name in first)
    done = command(*sltscale, "convert", run, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    damaged = two_checkpoints / "step-00000002/rank-00001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    done = command(*sltscale, "verify", run)
    assert done.returncode == 2
    assert "checkpoint step-00000002: rank-00001.safetensors does not match its sha256" in done.stdout
    assert "checkpoint step-00000001: whole" in done.stdout
    done = command(*sltscale, "convert", run, "--step", "2", "--out", tmp_path / "other")
    assert done.returncode == 2
    assert not (tmp_path / "other").exists()
    assert "holds no checkpoints" in command(*sltscale, "verify", tmp_path / "none").stderr
