"""Proofs that take minutes; each has its short form in the other files of this folder."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT, Launcher, kill_group

TRAIN = ROOT / "sltscale/train.py"
ZERO2 = ROOT / "ds_configs/zero2.json"
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(3600)]


def test_the_demo_reaches_its_scores(launcher: Launcher, tmp_path: Path) -> None:
    launcher.check(TRAIN, ["--deepspeed", str(ZERO2)], ranks=2, cwd=tmp_path, seconds=3400)
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert summary["bleu4"] >= 80
    assert summary["bleu4_shuffled"] <= 15
    assert summary["t2v_recall@1"] >= 70


def test_twenty_kills_at_random_moments(corpus, launcher: Launcher, tmp_path: Path) -> None:
    arguments = ["--deepspeed", str(ZERO2), "--recipe", str(corpus.pretrain), "--train.epochs", "120"]
    launcher.check(TRAIN, [*arguments, "--run", str(tmp_path / "unbroken")], ranks=2, seconds=1800)
    moments = random.Random(0)  # noqa: S311
    run = tmp_path / "killed"
    for _ in range(20):
        process = launcher.start(TRAIN, [*arguments, "--run", str(run)], 2, ROOT)
        wait_for_a_step(process, run / "steps.jsonl")
        time.sleep(moments.uniform(0, 1))  # a step takes 0.1 s, every fourth saves
        kill_group(process)
    output = launcher.check(TRAIN, [*arguments, "--run", str(run)], ranks=2, seconds=1800)
    assert "going on from the checkpoint of step" in output  # the kills did not outlast the run
    for file in ("steps.jsonl", "export/model.safetensors"):
        assert (run / file).read_bytes() == (tmp_path / "unbroken" / file).read_bytes()


def wait_for_a_step(process: subprocess.Popen[str], steps: Path) -> None:
    """Until this start has taken a step of its own: it shortens the file first, then every step adds a line."""
    started, size = time.time(), None
    while size is None or steps.stat().st_size <= size:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
        if size is None and steps.is_file() and steps.stat().st_mtime >= started:
            size = steps.stat().st_size
