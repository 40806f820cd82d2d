"""One step of the same global batch gives the same loss and the same weights on 1 and 2 ranks, ZeRO 0, 1, 2, 3."""

import json
from pathlib import Path

import pytest
import torch
from launching import Launcher

from sltscale.engine.checkpoint import assemble, latest_checkpoint

pytestmark = pytest.mark.multiprocess
WORKER = Path(__file__).with_name("steps_worker.py")


def state(folder: Path) -> dict[str, torch.Tensor]:
    found, complaints = latest_checkpoint(folder / "checkpoints")
    assert found is not None, complaints
    return assemble(found)


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def assert_same_state(
    ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], start: dict, learning: float = 0.9
) -> None:
    """Within 1e-5 relative. What the biases of keys and queries add to the scores cancels in the softmax, wholly for
    keys and mostly for queries, so their gradients are rounding noise or the small rest of large terms; their scale is
    that of the weights beside them."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        scale = reference[name.replace("bias", "weight")] if name.endswith(("k_proj.bias", "q_proj.bias")) else expected
        worst = (ours[name] - expected).abs().max() / scale.abs().max().clamp(min=1e-12)
        assert worst <= 1e-5, f"{name}: {worst:.2e}"
    changed = [name for name in reference if not torch.equal(reference[name], start[name])]
    assert len(changed) > learning * len(reference)


# Without clipping a wrong factor shows (clipped, a gradient has the same norm whatever its factor was); with it, that
# the norm is taken over all ranks.
@pytest.mark.parametrize(
    ("method", "clipping"),
    [("c2rl", []), ("translation", []), ("gfslt_vlp", []), ("c2rl", ["--clip_norm", "0.5"])],
)
def test_one_and_two_ranks_at_every_stage_take_the_same_step(
    method: str, clipping: list[str], launcher: Launcher, tmp_path: Path
) -> None:
    for ranks in (1, 2):
        arguments = ["--method", method, *clipping, "--out", str(tmp_path / f"ranks{ranks}")]
        launcher.check(WORKER, arguments, ranks=ranks)
    launcher.check(
        WORKER, ["--method", method, "--steps", "0", "--stages", "0", "--out", str(tmp_path / "start")], ranks=1
    )
    start = state(tmp_path / "start/zero0")
    reference = state(tmp_path / "ranks1/zero0")
    if method == "c2rl":
        assert any("logit_scale" in name for name in reference)
    for ranks in (1, 2):
        for stage in range(4):
            folder = tmp_path / f"ranks{ranks}/zero{stage}"
            assert_same_state(state(folder), reference, start)
            ours, expected = losses(folder)[0], losses(tmp_path / "ranks1/zero0")[0]
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "norm"),
    [("c2rl", "layer"), ("translation", "frozen"), pytest.param("gfslt_vlp", "layer", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "splits",
    [
        ((1, 24), (2, 16)),  # ranks, frames of a micro-batch
        pytest.param(((1, 16), (2, 24), (4, 16), (4, 64)), marks=pytest.mark.slow),
    ],
)
def test_micro_batches_take_the_step_of_the_whole_batch(
    method: str, norm: str, splits: tuple[tuple[int, int], ...], launcher: Launcher, tmp_path: Path
) -> None:
    """Eight clips of up to 8 frames, at once on one rank and in one to four parts on one to four ranks."""
    common = ["--method", method, "--norm", norm, "--clip_norm", "0.5"]
    runs = {f"{ranks} ranks, {frames} frames": (ranks, ["--micro_frames", str(frames)]) for ranks, frames in splits}
    start_and_whole = {"start": (1, ["--steps", "0", "--stages", "0"]), "whole": (1, ["--stages", "0"])}
    for name, (ranks, arguments) in (start_and_whole | runs).items():
        launcher.check(WORKER, [*common, *arguments, "--out", str(tmp_path / name)], ranks=ranks)
    reference, start = state(tmp_path / "whole/zero0"), state(tmp_path / "start/zero0")
    for name in runs:
        for stage in range(4):
            folder = tmp_path / name / f"zero{stage}"
            assert_same_state(state(folder), reference, start, 0.9 if norm == "layer" else 0.7)
            ours, expected = losses(folder)[0], losses(tmp_path / "whole/zero0")[0]
            assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
