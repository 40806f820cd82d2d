"""Running one cell of a sweep: training as a process of its own, and a note of why it failed, if it does.

Every rank of a job runs this, and training beneath it. Whether a cell is finished already is then for training to say,
in which rank 0 decides for all; that no other job trains it, the lock of its run folder sees to.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

import sltscale
from sltscale.errors import InputError
from sltscale.files import write_atomically
from sltscale.launching import Place, place
from sltscale.sweeps.folder import CellRun

STOPPED = 75  # training's exit code when a signal has stopped it with its state saved
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Of SIGUSR1 the launcher would die, and leave its ranks alone.
LAUNCHER_SIGNALS: dict[int, int] = {signal.SIGUSR1: signal.SIGTERM}
REMEMBERED = 50  # last lines of what training says on stderr


def run_cell(run: CellRun, deepspeed: str, ranks: int | None = None) -> int:
    """Train the cell, from where an earlier start has come to; training's exit code (75: stopped by a signal).

    ranks: start so many on this machine, by the deepspeed launcher; None: this process is one of a job's, or alone.
    Signals are passed on.
    """
    alone = ranks is not None or _place().world_size == 1
    if alone and run.finished:
        print(f"{run.cell.name}: already finished, see {run.run_folder.path}", flush=True)
        return 0
    run.path.mkdir(parents=True, exist_ok=True)
    started = _started()
    command = [*_launcher(ranks), "--deepspeed", deepspeed, *run.arguments()]
    code, said, received = _train(command, {} if ranks is None else LAUNCHER_SIGNALS)
    if received is not None and code != 0:
        if code > 0 and ranks is None:
            return code
        return STOPPED if -code in SIGNALS or _stopped(run) else 128 + received
    if code not in (0, STOPPED) and run.holder() is None:
        _note(run, _reason(code, said), started)
    return code if code >= 0 else 128 - code


def _launcher(ranks: int | None) -> list[str]:
    train = str(Path(sltscale.__file__).parent / "train.py")
    if ranks is None:
        return [sys.executable, train]
    return [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), train]


def _train(command: list[str], other: Mapping[int, int]) -> tuple[int, list[str], int | None]:
    """Exit code (negative: the signal that ended it), the last lines on stderr, the first signal received. Signals are
    passed on, as the ``other`` where there is one."""
    said: collections.deque[str] = collections.deque(maxlen=REMEMBERED)
    received: list[int] = []
    process: subprocess.Popen[str] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(other.get(number, number))

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")  # noqa: S603
        if received:
            process.send_signal(other.get(received[0], received[0]))
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)
        return process.wait(), list(said), received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _place() -> Place:
    """Of this process; training, beneath it, finds its own in the same variables, which stay as they are."""
    return place(os.environ, {os.getpid(), *(process.pid for process in psutil.Process().parents())})


def _stopped(run: CellRun) -> bool:
    return any(folder.status()["state"] == "stopped" for _, folder in run.stages)


def _started() -> str:
    """Tells this start from others; the same on all its ranks."""
    job = os.environ.get("SLURM_JOB_ID")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return f"process {os.getpid()}" if job is None else f"job {job}, start {int(restarts) + 1}"


def _reason(code: int, said: list[str]) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return errors[-1] if errors else next((line for line in reversed(said) if line.strip()), f"exit code {code}")


def _note(run: CellRun, reason: str, started: str) -> None:
    """The first rank that fails tells why; the others fail of that."""
    with suppress(OSError, ValueError):
        if json.loads(run.failure.read_text())["start"] == started:
            return
    content = {"start": started, "rank": _place().rank, "host": socket.gethostname(), "reason": reason}
    try:
        write_atomically(run.failure, json.dumps(content, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{run.failure} cannot be written: {error.strerror}; it should say: {reason}") from None
