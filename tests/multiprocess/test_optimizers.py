"""Groups with their own algorithm, schedule and update period: under every ZeRO stage the same update as separate torch
optimizers in one process, also with offload, a frozen tower and LoRA; resumed bit by bit."""

from pathlib import Path

import pytest
from launching import Launcher

WORKER = Path(__file__).with_name("optimizers_worker.py")


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_equals_separate_optimizers(ranks: int, launcher: Launcher, tmp_path: Path) -> None:
    launcher.check(WORKER, ["--out", str(tmp_path)], ranks=ranks)
