"""tools/bench_train.py as the instrument: steps of the real engine, on whatever device there is."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = (
    *("--size", "64", "--vocabulary", "200", "--steps", "2", "--threads", "1", "--optimizer", "sgd"),
    *("--method.visual.frames.embedding_size", "16", "--method.visual.frames.hidden_sizes", "[16,32]"),
    *("--method.visual.frames.depths", "[1,1]", "--method.visual.temporal.width", "64"),
    *("--method.visual.transformer.width", "64", "--method.visual.transformer.feed_forward", "64"),
    *("--method.visual.transformer.dropout", "0"),
)
TEXT_ENCODER = (
    *("--method.text_encoder.layers", "1", "--method.text_encoder.width", "64", "--method.text_encoder.heads", "4"),
    *("--method.text_encoder.feed_forward", "64", "--method.text_encoder.dropout", "0"),
)
TEXT_DECODER = (
    *("--method.text_decoder.layers", "1", "--method.text_decoder.width", "64"),
    *("--method.text_decoder.feed_forward", "64", "--method.text_decoder.dropout", "0"),
)


def bench(
    command: Callable[..., subprocess.CompletedProcess[str]], folder: Path, *arguments: str
) -> dict[str, dict[str, Any]]:
    """Run it with these arguments; the figures that it leaves, "sltscale" and "baseline"."""
    done = command("tools/bench_train.py", *arguments, "--json", folder / "figures.json", seconds=280)
    assert done.returncode == 0, done.stderr[-4000:]
    figures: dict[str, dict[str, Any]] = json.loads((folder / "figures.json").read_text())
    return figures


def check_ledger(figures: dict[str, Any]) -> None:
    """It adds up to the wall time, and to that of the steps."""
    ledger = figures["ledger"]
    assert {"data wait", "forward visual.frames", "loss", "backward", "norm, clipping", "optimizer"} <= ledger.keys()
    assert min(ledger.values()) >= 0
    assert abs(sum(ledger.values()) / figures["ledger_seconds"] - 1) < 0.03
