"""A run that dies at any moment of a save, is stopped, outlived by a rank of its own or short of room: it goes on from
a whole checkpoint, and ends in the weights of a run that was left alone."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_ranks import STEPS, Ranks, Starter, race

from sltscale.engine.checkpoint import latest_checkpoint
from sltscale.engine.faults import POINTS, fault_point
from sltscale.engine.run_folder import FencedError, RunFolder
from sltscale.engine.telemetry import Telemetry
from sltscale.errors import InputError

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def starter(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(environment, tmp_path_factory.mktemp("logs"))
    yield starter
    starter.end()


@pytest.fixture(scope="module")
def unbroken(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    starter.check(run)
    return run


def files(run: Path) -> dict[str, str]:
    """sha256 of every file of the last checkpoint: weights, optimizer state, buffers."""
    found, complaints = latest_checkpoint(run / "checkpoints")
    assert found is not None, complaints
    assert found.step == STEPS
    return {name: file["sha256"] for name, file in found.manifest["files"].items()}


def assert_as_left_alone(run: Path, unbroken: Path) -> None:
    assert files(run) == files(unbroken)
    assert (run / "steps.jsonl").read_text() == (unbroken / "steps.jsonl").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir() if "staging" in path.name] == []


def kill_at(starter: Starter, run: Path, fault: str) -> None:
    rank = int(fault.split(":rank")[1][0])
    ranks = starter.start(run, fault=fault)
    ranks.processes[rank].join(600)
    code = ranks.processes[rank].exitcode
    ranks.kill()
    assert code == -signal.SIGKILL, ranks.output()[-3000:]


# "pruning" comes first in the save after step 6, when three checkpoints are there; from "gathered" on rank 0 decides.
FAULTS = [
    f"{point}:rank{rank if point not in POINTS[7:13] else 0}:step{6 if point == 'pruning' else 4}:kill"
    for rank, point in enumerate(POINTS)
    for rank in (rank % 2,)
]
QUICK = ("written", "renamed", "pruning")


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=() if f.split(":")[0] in QUICK else pytest.mark.slow) for f in FAULTS]
)
def test_killed_at_a_point_of_a_save(fault: str, starter: Starter, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_at(starter, run, fault)
    point, _, step, _ = fault.split(":")
    saving = int(step.removeprefix("step"))
    committed = POINTS.index(point) >= POINTS.index("renamed")
    output = starter.check(run)
    assert f"going on from step {saving if committed else saving - 2}" in output
    assert_as_left_alone(run, unbroken)


def test_a_fault_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLTSCALE_FAULT", "somewhere:rank0:step4:kill")
    with pytest.raises(InputError, match="expected POINT:rankR:stepS:kill or :stop"):
        fault_point("begin", 4)


def signalled(starter: Starter, run: Path, seed: int) -> int:
    """SIGUSR1 to one rank at a random moment; the step that was saved."""
    moments = random.Random(seed)  # noqa: S311
    ranks = starter.start(run, seconds_per_step=0.4)  # long enough to be signalled before its end
    deadline = time.monotonic() + 600
    while not (run / "steps.jsonl").is_file() or not (run / "steps.jsonl").stat().st_size:
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.01)
    time.sleep(moments.uniform(0, 2.0))
    pid = ranks.processes[moments.randrange(2)].pid
    assert pid is not None
    os.kill(pid, signal.SIGUSR1)
    assert ranks.wait() == [75, 75], ranks.output()[-3000:]
    assert "Traceback" not in ranks.output()
    found, complaints = latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert complaints == []
    assert found.step == len((run / "steps.jsonl").read_text().splitlines())
    return found.step


@pytest.mark.parametrize("moments", [range(3), pytest.param(range(3, 23), marks=pytest.mark.slow)], ids=["3", "20"])
def test_sigusr1_to_one_rank_at_random_moments(
    moments: range, starter: Starter, unbroken: Path, tmp_path: Path
) -> None:
    for moment in moments:
        run = tmp_path / f"run{moment}"
        step = signalled(starter, run, moment)
        assert f"going on from step {step}" in starter.check(run)
        assert_as_left_alone(run, unbroken)


def test_a_rank_that_outlives_its_attempt_writes_nothing_and_ends(
    starter: Starter, unbroken: Path, tmp_path: Path
) -> None:
    """Rank 1 is frozen in the middle of a save, rank 0 dies, the next attempt finishes; then rank 1 wakes up."""
    run = tmp_path / "run"
    orphaned = starter.start(run, fault="staged:rank1:step4:stop")
    wait_until_stopped(orphaned, 1)
    orphaned.processes[0].kill()
    orphaned.processes[0].join()
    starter.check(run)
    assert_as_left_alone(run, unbroken)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    go_on(orphaned, 1)
    orphaned.processes[1].join(30)
    assert orphaned.processes[1].exitcode == 1, orphaned.output()[-3000:]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def wait_until_stopped(ranks: Ranks, rank: int) -> None:
    deadline = time.monotonic() + 600
    while not is_stopped(ranks, rank):
        assert ranks.processes[rank].exitcode is None, ranks.output()
        assert time.monotonic() < deadline, ranks.output()
        time.sleep(0.05)


def is_stopped(ranks: Ranks, rank: int) -> bool:
    state = Path(f"/proc/{ranks.processes[rank].pid}/stat")
    return state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] == "T"


def go_on(ranks: Ranks, rank: int) -> None:
    pid = ranks.processes[rank].pid
    assert pid is not None
    os.kill(pid, signal.SIGCONT)


def test_an_orphan_finds_another_name_in_the_lock(tmp_path: Path) -> None:
    orphan = RunFolder(tmp_path)
    orphan.join("0123456789ab")
    (tmp_path / "lock").write_text("process 1 on a since b, attempt 0123456789ab\n")
    orphan.set_status("running", step=1, seconds=1.0)
    telemetry = Telemetry("tiny", orphan, 0, STEPS)
    telemetry.say("before")
    (tmp_path / "lock").write_text("process 2 on a since c, attempt ba9876543210\n")
    with pytest.raises(FencedError, match="process 2 on a"):
        orphan.set_status("running", step=2, seconds=2.0)
    assert json.loads((tmp_path / "STATUS.json").read_text())["step"] == 1
    with pytest.raises(FencedError, match="process 2 on a"):
        telemetry.say("after")
    assert orphan.log.read_text() == "before\n"
    telemetry.close()


def test_of_two_starts_one_runs(starter: Starter, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    starts = [starter.start(run, fault="begin:rank0:step2:stop") for _ in range(2)]
    deadline = time.monotonic() + 600
    while not any(is_stopped(ranks, 0) for ranks in starts):
        assert any(ranks.processes[0].exitcode is None for ranks in starts), starts[0].output() + starts[1].output()
        assert time.monotonic() < deadline, starts[0].output() + starts[1].output()
        time.sleep(0.05)
    runs, refused = starts if is_stopped(starts[0], 0) else starts[::-1]
    assert refused.wait() == [2, 2]
    assert f"run folder {run} is in use by process {runs.processes[0].pid} on " in refused.output()
    go_on(runs, 0)
    assert runs.wait() == [0, 0]
    assert_as_left_alone(run, unbroken)


def test_of_two_starts_at_the_same_instant_one_gets_the_folder_twenty_times(starter: Starter, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier, outcomes = context.Barrier(2), context.SimpleQueue()
    rounds = [tmp_path / f"run{number}" for number in range(20)]
    racers = [context.Process(target=race, args=(rounds, barrier, outcomes)) for _ in range(2)]
    for racer in racers:
        racer.start()
    seen: dict[Path, list[str]] = {path: [] for path in rounds}
    for _ in range(40):
        path, outcome = outcomes.get()
        seen[path].append(outcome)
    for racer in racers:
        racer.join(600)
    assert all(sorted(outcome.split(" by ")[0] for outcome in both) == ["in use", "opened"] for both in seen.values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system of a given size can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path, starter: Starter, unbroken: Path) -> None:
    """The next checkpoint does not fit, and the run says so before it writes anything of it."""
    run = small_disk / "run"
    first = starter.start(run, fault="pruned:rank0:step2:stop")
    wait_until_stopped(first, 0)
    (small_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 150_000))
    go_on(first, 0)
    assert first.wait() == [1, 1]
    found, complaints = latest_checkpoint(run / "checkpoints")
    assert found is not None
    assert complaints == []
    assert not list((run / "checkpoints").glob("staging-*"))
    assert "bytes needed, " in first.output()
    assert " free in " in first.output()
    (small_disk / "ballast").unlink()
    assert f"going on from step {found.step}" in starter.check(run)
    assert files(run) == files(unbroken)


def test_a_rank_that_cannot_write_in_the_middle_of_a_file(starter: Starter, unbroken: Path, tmp_path: Path) -> None:
    """Files may grow to 100 kB, which is less than a rank's part of a checkpoint."""
    run = tmp_path / "run"
    ranks = starter.start(run, file_limit=100_000)
    assert ranks.wait() == [1, 1]
    assert "checkpoint of step 2 not written: rank-00000.safetensors: " in ranks.output()
    assert list((run / "checkpoints").iterdir()) == []
    starter.check(run)
    assert_as_left_alone(run, unbroken)
