"""Proofs that take minutes; each has its short form in the other files of this folder."""

import json
import random
import time
from pathlib import Path

import pytest
from launching import ROOT, Launcher, kill_group

TRAIN = ROOT / "sltscale/train.py"
ZERO2 = ROOT / "ds_configs/zero2.json"
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(3600)]


def test_the_demo_reaches_its_scores(launcher: Launcher, tmp_path: Path) -> None:
    launcher.check(TRAIN, ["--deepspeed", str(ZERO2)], ranks=2, cwd=tmp_path, seconds=1500)
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert summary["bleu4"] >= 80
    assert summary["bleu4_shuffled"] <= 15
    assert summary["t2v_recall@1"] >= 70
    assert summary["seconds"] < 1500


def test_twenty_kills_at_random_moments(corpus, launcher: Launcher, tmp_path: Path) -> None:
    arguments = ["--deepspeed", str(ZERO2), "--recipe", str(corpus.pretrain), "--train.epochs", "40"]
    started = time.monotonic()
    launcher.check(TRAIN, [*arguments, "--run", str(tmp_path / "unbroken")], ranks=2, seconds=600)
    seconds = time.monotonic() - started
    moments = random.Random(0)  # noqa: S311
    run = tmp_path / "killed"
    for _ in range(20):
        process = launcher.start(TRAIN, [*arguments, "--run", str(run)], 2, ROOT)
        time.sleep(moments.uniform(0.1, 0.2) * seconds)
        kill_group(process)
    output = launcher.check(TRAIN, [*arguments, "--run", str(run)], ranks=2, seconds=600)
    assert "going on from the checkpoint of step" in output  # the kills did not outlast the run
    for file in ("steps.jsonl", "export/model.safetensors"):
        assert (run / file).read_bytes() == (tmp_path / "unbroken" / file).read_bytes()
