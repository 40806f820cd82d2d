"""The cells of a sweep on one machine: never trained by two, stopped by signals, and why one failed is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launching import ROOT, kill_group
from tiny_recipes import Corpus

from sltscale.sweeps.folder import CellRun, Sweep, open_sweep
from sltscale.sweeps.results import results

pytestmark = pytest.mark.multiprocess
Command = Callable[..., subprocess.CompletedProcess[str]]
GRID = """
[[cells]]
name = "sound"
train.epochs = 200
[[cells]]
name = "without-shards"
data.shards = "/nowhere"
"""


@pytest.fixture
def sweep(command: Command, corpus: Corpus, tmp_path: Path) -> Sweep:
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID)
    planned = command("-m", "sltscale.cli", "sweep", "plan", tmp_path / "sweep", grid, "--recipe", corpus.pretrain)
    assert planned.returncode == 0, planned.stderr
    return open_sweep(tmp_path / "sweep")


@contextmanager
def training(sweep: Sweep, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """``sltscale sweep run``, and below it the training of cell 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sltscale.cli", "sweep", "run", sweep.folder, "--cell", "0"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_group(process)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def state_of(run: CellRun, sweep: Sweep) -> tuple[str, str]:
    (one,) = [one for one in results(sweep) if one.run.cell == run.cell]
    return one.state, one.why


def test_why_a_cell_failed_is_told(command: Command, sweep: Sweep) -> None:
    done = command("-m", "sltscale.cli", "sweep", "run", sweep.folder, "--cell", "1")
    assert done.returncode == 2, done.stderr
    reason = done.stderr.splitlines()[-1].removeprefix("error: ")
    assert "/nowhere" in reason
    state, why = state_of(sweep.run(sweep.cell(1)), sweep)
    assert state == "failed"
    assert why.startswith(reason)
    shown = command("-m", "sltscale.cli", "sweep", "status", sweep.folder)
    assert shown.returncode == 0, shown.stderr
    assert reason in shown.stdout


@pytest.mark.slow
def test_one_trains_and_stops_by_a_signal(command: Command, environment: dict[str, str], sweep: Sweep) -> None:
    run = sweep.run(sweep.cell(0))
    with training(sweep, environment) as process:
        steps = run.run_folder.steps
        wait_for(lambda: steps.is_file() and len(steps.read_text().splitlines()) > 1)
        second = command("-m", "sltscale.cli", "sweep", "run", sweep.folder, "--cell", "0")
        assert second.returncode == 2, second.stderr
        assert f"run folder {run.run_folder.path} is in use by process " in second.stderr
        assert state_of(run, sweep)[0] == "running"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(600) == 75
    assert state_of(run, sweep) == ("stopped", "tiny_pretrain, by a signal")
    assert len(run.run_folder.attempts()) == 1

    with training(sweep, environment) as process:
        wait_for(psutil.Process(process.pid).children)
        (child,) = psutil.Process(process.pid).children()
        os.kill(child.pid, signal.SIGKILL)
        assert process.wait(600) == 128 + signal.SIGKILL
    state, why = state_of(run, sweep)
    assert state == "failed"
    assert why.startswith("killed by SIGKILL (out of memory?)")
