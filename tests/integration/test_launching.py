"""What can go wrong before the first step, told in one line: left-over variables, absent ranks, no locks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, free_port
from tiny_recipes import Corpus

pytestmark = pytest.mark.multiprocess
ZERO2 = ROOT / "ds_configs/zero2.json"
TRAIN = [sys.executable, str(ROOT / "sltscale/train.py")]
# Makes flock(2) fail as on a file system without locks, then becomes the command: BPF of "if nr == FLOCK: ENOLCK".
WITHOUT_LOCKS = """
import ctypes, os, platform, struct, sys
FLOCK = {"x86_64": 73, "aarch64": 32}[platform.machine()]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, FLOCK), (0x06, 0, 0, 0x00050000 | 37), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())  # a filter of system calls
os.execv(sys.argv[1], sys.argv[1:])
"""


def train(
    corpus: Corpus,
    run: Path,
    environment: dict[str, str],
    *overrides: str,
    launcher: list[str] = TRAIN,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, "--deepspeed", str(ZERO2), "--recipe", str(corpus.pretrain), "--run", str(run), *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def refusal(done: subprocess.CompletedProcess[str], run: Path) -> str:
    """The one line of ours; nothing was written."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert not run.exists()
    return lines[0]


def test_variables_of_another_job(corpus: Corpus, environment: dict[str, str], tmp_path: Path) -> None:
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    leaked = environment | step | {"SLURM_TASK_PID": str(os.getpid() + 1)}
    line = refusal(train(corpus, tmp_path / "run", leaked), tmp_path / "run")
    assert "SLURM's variables are those of job 77" in line
    script = environment | {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}
    assert "srun has not started this process" in refusal(train(corpus, tmp_path / "run", script), tmp_path / "run")


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, "rank 1 of 2 has not come"), (1, "does not reach rank 0")], ids=["rank 1", "rank 0"]
)
def test_a_rank_that_does_not_come(
    rank: int, expected: str, corpus: Corpus, environment: dict[str, str], tmp_path: Path
) -> None:
    alone = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = train(corpus, tmp_path / "run", environment | alone, "--train.watchdog_seconds", "10")
    line = refusal(done, tmp_path / "run")
    assert expected in line
    assert os.uname().nodename in line


def test_a_file_system_that_cannot_lock(corpus: Corpus, environment: dict[str, str], tmp_path: Path) -> None:
    launcher = [sys.executable, "-c", WITHOUT_LOCKS, *TRAIN]
    line = refusal(train(corpus, tmp_path / "run", environment, launcher=launcher), tmp_path / "run")
    assert f"run folder {tmp_path / 'run'} is on a file system that cannot lock" in line
    (tmp_path / "old").mkdir()
    (tmp_path / "old/lock").touch()
    done = train(corpus, tmp_path / "old", environment, launcher=launcher)
    assert done.returncode == 2
    assert "cannot lock" in done.stderr
