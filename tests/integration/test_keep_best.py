"""The best checkpoint by a dev score stays, and the run ends in it where the recipe says so."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file

from sltscale.engine.checkpoint import assemble
from sltscale.engine.manifest import folders, verify

Command = Callable[..., subprocess.CompletedProcess[str]]


def train(command: Command, corpus, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    best = ("--train.keep_best.score", "t2v_recall@1", "--train.select", "best", "--train.keep_checkpoints", "1")
    return command(
        *(ROOT / "sltscale/train.py", "--deepspeed", ROOT / "ds_configs/zero2.json", "--recipe", corpus.pretrain),
        *("--run", run, *best, "--evaluation.every_epochs", "1", *more),
    )


@pytest.mark.slow
def test_the_best_by_a_dev_score_stays_and_is_exported(command: Command, corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(command, corpus, run)
    assert done.returncode == 0, done.stderr
    scores = json.loads((run / "checkpoints/scores.json").read_text())
    assert list(scores) == ["7", "14", "21"]  # the last one too, which is otherwise not scored on dev
    best = max(scores, key=lambda step: (scores[step]["t2v_recall@1"], -int(step)))
    assert {folder.name for folder in folders(run / "checkpoints")} == {f"step-{int(best):08d}", "step-00000021"}
    expected = assemble(verify(run / f"checkpoints/step-{int(best):08d}"))
    exported = load_file(run / "export/model.safetensors")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    if best != "21":
        assert f"the best is the checkpoint of step {best}" in done.stdout

    # Killed after the last checkpoint was committed and before it was scored: the next start scores it first.
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "evaluation")
    (run / "STATUS.json").write_text(json.dumps({"state": "running", "step": 21, "seconds": 1.0}))
    (run / "checkpoints/scores.json").write_text(json.dumps({step: scores[step] for step in ("7", "14")}))
    done = train(command, corpus, run)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "checkpoints/scores.json").read_text()) == scores
    again = load_file(run / "export/model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_settings_that_cannot_be_followed(command: Command, corpus, tmp_path: Path) -> None:
    done = train(command, corpus, tmp_path / "run", "--evaluation.every_epochs", "none")
    assert (done.returncode, "train.keep_best needs scores" in done.stderr) == (2, True)
    done = train(command, corpus, tmp_path / "run", "--train.keep_best", "none")
    assert (done.returncode, 'select is "best", but keep_best names no score' in done.stderr) == (2, True)
    done = train(command, corpus, tmp_path / "run", "--train.keep_best.score", "bleu44")
    assert (done.returncode, "bleu44" in done.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
