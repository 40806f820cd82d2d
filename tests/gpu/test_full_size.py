"""GFSLT-VLP at full size on a GPU: steps in bfloat16 under ZeRO 2 and 3, and what checkpointing does to the memory.

The attention backends' GPU tests are in tests/numerics/test_attention.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu.bench import bench, check_ledger

Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: steps of the full size want one"),
]
FULL = ("--recipe", "gfslt_vlp_v1", "--lengths", "32,64", "--steps", "3", "--method.text_encoder.dropout", "0")
FULL += ("--method.visual.transformer.dropout", "0")


@pytest.mark.parametrize("stage", ["2", "3"])
def test_bfloat16_steps(command: Command, tmp_path: Path, stage: str) -> None:
    single = bench(command, tmp_path, *FULL)["sltscale"]
    half = bench(command, tmp_path, *FULL, "--precision", "bf16", "--stage", stage)["sltscale"]
    assert half["result"][0] == pytest.approx(single["result"][0], abs=0.05)
    assert 0 < half["flops"] / min(half["seconds"]) < half["peak_flops"]
    check_ledger(half)


def test_checkpointing_saves_memory_and_changes_no_loss(command: Command, tmp_path: Path) -> None:
    arguments = (*FULL, "--precision", "bf16", "--lengths", "128,128,128,128")
    kept = bench(command, tmp_path, *arguments)["sltscale"]
    checkpointed = bench(command, tmp_path, *arguments, "--method.visual.frames.checkpoint_activations", "true")
    saved = kept["memory_gib"] - checkpointed["sltscale"]["memory_gib"]
    # A frame's share of the step's peak in bfloat16, by the bytes that a ResNet-18 at 224 px holds: 11.8 MB, of which
    # 7.2 MB remain, its first block's recomputation and what its backward holds.
    assert saved > 0.7 * 512 * 4.6e6 / 2**30
    # The first steps: rounding in bfloat16 sends later ones apart.
    assert checkpointed["sltscale"]["result"][:3] == pytest.approx(kept["result"][:3], rel=0.02)
