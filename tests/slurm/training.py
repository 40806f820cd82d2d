"""A training job on the tests' cluster: the tiny recipe on two nodes, a rank on each."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT
from slurm.cluster import ENDED, Cluster, wait_for
from tiny_recipes import Corpus

TRAIN = ROOT / "sltscale/train.py"
ZERO2 = ROOT / "ds_configs/zero2.json"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


def arguments(corpus: Corpus, run: Path, epochs: int = 16) -> list[str]:
    """7 steps an epoch, a checkpoint every 4."""
    return ["--recipe", str(corpus.pretrain), "--run", str(run), "--train.epochs", str(epochs)]


@dataclass(frozen=True)
class Training:
    """A job that trains in ``run`` and prints to ``log``."""

    cluster: Cluster
    job: str
    run: Path
    log: Path

    @classmethod
    def submit(cls, cluster: Cluster, run: Path, arguments: list[str], *options: str) -> Training:
        log = run.with_name(f"{run.name}-{len(list(run.parent.iterdir()))}.log")
        job = cluster.submit(*options, f"--output={log}", "slurm/train.sbatch", *arguments)
        return cls(cluster, job, run, log)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_steps(self, count: int, start: int = 1, seconds: float = 600) -> None:
        """Until that start of the job is at work and so many steps are done."""

        def there() -> bool:
            state = self.cluster.show(self.job)["JobState"]
            assert state not in ENDED, f"{state}\n{self.said()[-4000:]}"
            lock = self.run / "lock"
            return lock.is_file() and f" start {start} since" in lock.read_text() and len(steps(self.run)) >= count

        wait_for(there, seconds, f"{count} steps of job {self.job} in start {start}", self.said)

    @contextmanager
    def held(self, rank: int) -> Iterator[int]:
        """That rank stopped, and so before long the others, which wait for it; yields its process."""
        process = self.cluster.ranks(self.job)[rank]
        os.kill(process, signal.SIGSTOP)
        try:
            yield process
        finally:
            if alive(process):
                os.kill(process, signal.SIGCONT)

    def end(self, seconds: float = 900) -> dict[str, str]:
        return self.cluster.wait(self.job, seconds, self.log)


def steps(run: Path) -> list[str]:
    """Their records: numbers are printed so that they read back bit for bit."""
    return (run / "steps.jsonl").read_text().splitlines() if (run / "steps.jsonl").is_file() else []


def losses(run: Path) -> dict[int, str]:
    return {json.loads(line)["step"]: line for line in steps(run)}


def weights(run: Path) -> bytes:
    return (run / "export/model.safetensors").read_bytes()


def contents(run: Path) -> dict[str, tuple[int, str]]:
    """Of every file when it was last written, and what is in it."""
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


def alive(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def signalled(process: int, number: signal.Signals) -> bool:
    """Whether a process that was stopped has that signal before it, or goes on, or is gone: SLURM may continue it."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except OSError:
        return True
    masks = [int(fields[name], 16) for name in ("SigPnd", "ShdPnd")]
    return "stopped" not in fields["State"] or any(mask >> (number - 1) & 1 for mask in masks)
