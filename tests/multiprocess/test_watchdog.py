"""A rank that hangs: every rank writes where it is, and the run ends."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_ranks import Starter

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def starter(environment: dict[str, str], tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(environment, tmp_path)
    yield starter
    starter.end()


def test_a_rank_that_hangs(starter: Starter, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = starter.start(run, hang=(1, 3), train={"watchdog_seconds": 8.0})
    assert ranks.wait() == [1, 1]
    for rank, at_work in ((0, "loop.py"), (1, "in batches")):
        stacks = run / f"stacks/rank-{rank:05d}.txt"
        assert at_work in stacks.read_text()
        line = f"rank {rank}: step 3 has taken longer than 8 s (train.watchdog_seconds); where it is: {stacks}"
        assert line in ranks.output()
        assert line in (run / "log.txt").read_text()
    assert (run / "checkpoints/step-00000002/MANIFEST.json").is_file()


WAITS_FOR_A_LOCK = """
import sys
from pathlib import Path
from torch.utils.file_baton import FileBaton
from sltscale.engine.watchdog import Watchdog
with Watchdog(1.0) as watchdog:
    watchdog.watch("the start-up")
    FileBaton(sys.argv[1]).wait()
"""


def test_a_start_that_waits_for_a_compile_lock(environment: dict[str, str], tmp_path: Path) -> None:
    lock = tmp_path / "op/lock"
    lock.parent.mkdir()
    lock.touch()
    done = subprocess.run(
        [sys.executable, "-c", WAITS_FOR_A_LOCK, lock],
        env=environment | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "file_baton.py" in done.stderr
    assert f"the start-up has taken longer than 1 s (train.watchdog_seconds); compile locks: {lock}" in done.stderr


LIMITS = """
import torch
import torch.distributed as dist
from sltscale.config import OptimSettings
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.signals import leave
start_processes(watchdog_seconds=7000)
for stage in range(4):
    settings = {"zero_optimization": {"stage": stage}}
    build_engine(torch.nn.Linear(2, 2), OptimSettings(name="adamw", lr=0.1), settings)
for group in dist.distributed_c10d._world.pg_map:
    print("limit", group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
leave(0)
"""


def test_collectives_wait_longer_than_the_watchdog(environment: dict[str, str]) -> None:
    """Or the rank that waits would end before it has said where."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITS], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    limits = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("limit")]
    assert len(limits) >= 2  # the world, and the engine's clone of it
    assert min(limits) > 7000
