"""A sweep as an array of jobs: whatever ends early is made up for, and every cell is trained exactly once."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from launching import ROOT
from slurm.cluster import Cluster, wait_for
from tiny_recipes import Corpus

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
GRID = """
[grid]
"optim.lr" = [1e-3, 3e-3]
seed = [1, 2]
"""
KILLED = 2
TUNED = ["--train.checkpoint_every", "2", "--evaluation.every_epochs", "1"]


def kill_all(cluster: Cluster, job: str) -> None:
    """Its script first, so that nothing of the job can act on what happens to it."""
    for process in [process for node in cluster.nodes for process in cluster.processes(node, job)]:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_a_killed_cell_is_made_up_for_and_every_cell_is_trained_once(
    cluster: Cluster, corpus: Corpus, tmp_path: Path
) -> None:
    sweep, grid, site = tmp_path / "sweep", tmp_path / "grid.toml", tmp_path / "site.env"
    grid.write_text(GRID)
    site.write_text(f"MASTER_ADDR=127.0.0.1\nSBATCH_OUTPUT={tmp_path}/log-%a\n")
    submission = ["submit", corpus.pretrain, "--array", grid, "--run", sweep, "--site", site, *TUNED]

    def sltscale(*arguments: str | Path) -> str:
        return cluster(ROOT / ".venv/bin/sltscale", *arguments, seconds=600)

    def runs() -> list[Path]:
        cells = json.loads((sweep / "sweep.json").read_text())["cells"]
        return [sweep / cell["name"] / "tiny_pretrain" for cell in cells]

    said = sltscale(*submission, "--processes", "1")
    assert "cells 0-3 of 4" in said
    first = re.search(r"job (\d+)", said)[1]
    checkpoints = runs()[KILLED] / "checkpoints"
    log = tmp_path / f"log-{KILLED}"
    wait_for(lambda: list(checkpoints.glob("step-*")), 600, "a checkpoint of the cell", lambda: log.read_text())
    kill_all(cluster, cluster.show(f"{first}_{KILLED}")["JobId"])
    ended = [cluster.wait(f"{first}_{cell}", 150, tmp_path / f"log-{cell}")["JobState"] for cell in range(4)]
    assert ended == ["FAILED" if cell == KILLED else "COMPLETED" for cell in range(4)]
    status = sltscale("sweep", "status", sweep)
    assert status.count(" done ") == 3
    assert re.search(r"seed=1 +broken .* went without a word", status), status

    said = sltscale(*submission, "--processes", "2")  # the same on more ranks
    assert f"cells {KILLED} of 4" in said
    second = re.search(r"job (\d+)", said)[1]
    assert cluster.wait(f"{second}_{KILLED}", 120, log)["JobState"] == "COMPLETED", log.read_text()
    for cell, run in enumerate(runs()):
        steps = [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]
        assert steps == list(range(json.loads((run / "STATUS.json").read_text())["step"]))
        attempts = json.loads((run / "environment.json").read_text())
        assert [attempt["world_size"] for attempt in attempts] == ([1, 2] if cell == KILLED else [1])
        assert attempts[-1]["step"] > 0 or cell != KILLED

    touched = {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    assert "nothing to submit: the 4 cells" in sltscale(*submission, "--processes", "1")
    third = cluster.submit("--array=0-3", f"--output={tmp_path}/log-%a", "slurm/sweep.sbatch", sweep)
    for cell in range(4):
        assert cluster.wait(f"{third}_{cell}", 60, tmp_path / f"log-{cell}")["JobState"] == "COMPLETED"
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("*")} == touched

    table = sltscale("sweep", "table", sweep)
    assert "seed" in table
    with (sweep / "table.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["optim.lr"], row["seed"], row["state"]) for row in rows] == [
        ("0.001", "1", "done"),
        ("0.001", "2", "done"),
        ("0.003", "1", "done"),
        ("0.003", "2", "done"),
    ]
    for row, run in zip(rows, runs(), strict=True):
        metrics = json.loads((run / "evaluation/test/metrics.json").read_text())
        assert float(row["t2v_recall@1"]) == metrics["t2v_recall@1"]
