"""The forecast of what engines hold, against engines."""

import json
from pathlib import Path

import pytest
import torch
from launching import Launcher

WORKER = Path(__file__).with_name("forecast_worker.py")


@pytest.mark.multiprocess
def test_bytes_of_each_stage_are_exact(launcher: Launcher) -> None:
    """The short form: each stage once."""
    assert "all equal" in launcher.check(WORKER, ["short"], ranks=2)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bytes_of_every_stage_are_exact(ranks: int, launcher: Launcher) -> None:
    """Weights, masters, gradients and optimizer state on each rank at ZeRO 0 to 3, in fp32 and bf16, with offload,
    whole steps and micro-batches; a frozen tower, SGD, Adam and AdamW side by side."""
    assert "all equal" in launcher.check(WORKER, ranks=ranks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the peak of a GPU's memory needs a CUDA device")
def test_peak_of_a_gpu(launcher: Launcher) -> None:
    """c2rl_pretrain at its own sizes, 8 clips of 75 frames, bf16 at ZeRO 2, one rank."""
    output = launcher.check(Path(__file__).with_name("forecast_peak_worker.py"), ranks=1)
    (line,) = [line for line in output.splitlines() if '"forecast"' in line]
    bytes_of = json.loads(line[line.index("{") :])
    print(bytes_of)
    assert bytes_of["forecast"] == pytest.approx(bytes_of["found"], rel=0.10)
