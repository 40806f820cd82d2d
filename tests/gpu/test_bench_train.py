"""tools/bench_train.py on models so small that a CPU takes their steps at once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from gpu.bench import SMALL, TEXT_DECODER, TEXT_ENCODER, bench, check_ledger

Command = Callable[..., subprocess.CompletedProcess[str]]
AS_THE_CODE = ("--method.visual.edge_copies", "frames", "--method.visual.temporal.norm_over", "padded")


@pytest.mark.slow
def test_our_step_and_the_baseline_s_are_the_same_work(command: Command, tmp_path: Path) -> None:
    arguments = ("--recipe", "gfslt_vlp_v1", "--lengths", "6,9,5", *SMALL, *TEXT_ENCODER, *AS_THE_CODE, "--baseline")
    figures = bench(command, tmp_path, *arguments)
    ours, baseline = figures["sltscale"], figures["baseline"]
    assert (ours["clips"], ours["frames"], ours["parameters"]) == (3, 20, baseline["parameters"])
    assert ours["padding"] == pytest.approx(7 / 27)
    assert len(ours["seconds"]) == 2 and ours["memory_gib"] > 0.1
    losses = baseline["result"]  # of the steps one after the other, on a GPU of fewer
    assert ours["result"][: len(losses)] == pytest.approx(losses, rel=1e-3)
    assert ours["result"][0] == pytest.approx(losses[0], rel=1e-5)
    assert 0 < ours["flops"] < ours["peak_flops"] * min(ours["seconds"])
    check_ledger(ours)
    assert sum(ours["seconds"]) == pytest.approx(ours["ledger_seconds"], rel=0.03)


@pytest.mark.slow
def test_a_step_in_bfloat16(command: Command, tmp_path: Path) -> None:
    arguments = ("--recipe", "gfslt_slt", "--lengths", "6,9", *SMALL, *TEXT_DECODER, *AS_THE_CODE, "--baseline")
    figures = bench(command, tmp_path, *arguments, "--precision", "bf16")
    half, single = figures["sltscale"]["result"], figures["baseline"]["result"]
    assert half[: len(single)] == pytest.approx(single, rel=0.02)
    assert half[: len(single)] != pytest.approx(single, rel=1e-6)
    check_ledger(figures["sltscale"])


@pytest.mark.slow
def test_decoding(command: Command, tmp_path: Path) -> None:
    arguments = ("--recipe", "gfslt_slt", "--lengths", "6,9", *SMALL, *TEXT_DECODER, "--decode")
    ours = bench(command, tmp_path, *arguments, "--evaluation.max_new_tokens", "7")["sltscale"]
    assert len(ours["result"]) == 2 and max(ours["result"]) <= 7
    assert abs(sum(ours["ledger"].values()) / ours["ledger_seconds"] - 1) < 0.03


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--lengths", "6,900"), "bench_train: --lengths: no drawn video has 900 frames left"),
        pytest.param(
            ("--lengths", "6,"),
            "bench_train: --lengths 6,: expected numbers of frames from 1 up",
            marks=pytest.mark.slow,
        ),
        (("--lengths", "6,0"), "bench_train: --lengths 6,0: expected numbers of frames from 1 up"),
        (("--recipe", "gfslt_slt", "--optim.lrr", "1"), "unknown key optim.lrr; did you mean lr"),
    ],
)
def test_bad_input_ends_in_one_line(command: Command, arguments: tuple[str, ...], message: str) -> None:
    done = command("tools/bench_train.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
