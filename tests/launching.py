"""Starting real processes from tests: through the deepspeed launcher, with a time limit and a group of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PORTS = iter(range(10_000 + 5 * (os.getpid() % 1000), 20_000))


@dataclass(frozen=True)
class Finished:
    returncode: int
    output: str


class Launcher:
    """Starts scripts under the ``deepspeed`` launcher; ends everything it started."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.started: list[subprocess.Popen[str]] = []

    def start(self, script: Path | str, arguments: Sequence[str], ranks: int, cwd: Path) -> subprocess.Popen[str]:
        launcher = Path(sys.executable).with_name("deepspeed")
        process = subprocess.Popen(
            [
                *(sys.executable, launcher, "--num_gpus", str(ranks), "--master_port", str(free_port())),
                *(str(script), *arguments),
            ],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(
        self, script: Path | str, arguments: Sequence[str] = (), *, ranks: int, cwd: Path = ROOT, seconds: float = 800
    ) -> Finished:
        process = self.start(script, arguments, ranks, cwd)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill_group(process)
            output, _ = process.communicate()
            pytest.fail(f"{script} did not end within {seconds} s:\n{output[-4000:]}")
        return Finished(process.returncode, output)

    def check(self, script: Path | str, arguments: Sequence[str] = (), *, ranks: int, **options: float) -> str:
        finished = self.run(script, arguments, ranks=ranks, **options)
        assert finished.returncode == 0, finished.output[-6000:]
        return finished.output

    def end(self) -> None:
        for process in self.started:
            kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the process group that ``process`` leads."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def free_port() -> int:
    """Another one at each call, below those that the system hands out by itself and that sltscale takes under SLURM."""
    while True:
        port = next(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
