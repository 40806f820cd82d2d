"""Whatever ends a job on a cluster, it goes on by itself, and the result is that of a run that was left alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launching import Launcher
from slurm.cluster import Cluster, wait_for
from slurm.training import TRAIN, TWO_NODES, ZERO2, Training, alive, arguments, contents, losses, signalled, weights
from tiny_recipes import Corpus

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def unbroken(corpus: Corpus, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the deepspeed launcher with two ranks, without SLURM."""
    launcher = Launcher(environment)
    run = tmp_path_factory.mktemp("unbroken") / "run"
    try:
        launcher.check(TRAIN, ["--deepspeed", str(ZERO2), *arguments(corpus, run)], ranks=2)
    finally:
        launcher.end()
    return run


@pytest.fixture
def training(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> Training:
    """Two nodes, a rank on each; past its first checkpoint."""
    run = tmp_path / "run"
    training = Training.submit(cluster, run, arguments(corpus, run), *TWO_NODES)
    training.wait_for_steps(6)
    return training


def check(training: Training, unbroken: Path, restarts: int = 1) -> None:
    """It ended as if nothing had happened, after at least so many more starts."""
    end = training.end()
    assert end["JobState"] == "COMPLETED", training.said()[-6000:]
    assert int(end["Restarts"]) >= restarts
    assert losses(training.run) == losses(unbroken)
    assert weights(training.run) == weights(unbroken)


def test_two_nodes_are_two_ranks(cluster: Cluster, corpus: Corpus, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training = Training.submit(cluster, run, arguments(corpus, run), *TWO_NODES)
    end = training.end()
    assert end["JobState"] == "COMPLETED", training.said()[-6000:]
    assert (end["Restarts"], end["NumNodes"]) == ("0", "2")
    assert "2 ranks" in training.said()
    assert losses(run) == losses(unbroken)
    assert weights(run) == weights(unbroken)


def test_the_time_limit(cluster: Cluster, corpus: Corpus, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    submitted = time.monotonic()
    training = Training.submit(cluster, run, arguments(corpus, run), *TWO_NODES, "--time=20", "--signal=USR1@55")
    training.wait_for_steps(6)
    with training.held(1) as process:
        # However long the start took, at least a minute is left, and the signal still to come.
        minutes = int(time.monotonic() - submitted) // 60 + 2
        cluster("scontrol", "update", f"JobId={training.job}", f"TimeLimit={minutes}")
        wait_for(lambda: signalled(process, signal.SIGUSR1), 600, "SIGUSR1", training.said)
        cluster("scontrol", "update", f"JobId={training.job}", "TimeLimit=20")  # for a slow machine's next start
    check(training, unbroken)
    assert "stopped by a signal after step" in training.said()


def test_one_disturbance_after_another(training: Training, unbroken: Path) -> None:
    """Five starts: requeued by hand, a rank killed, a node set down, pre-empted by a job of higher priority."""
    cluster, job = training.cluster, training.job
    cluster("scontrol", "requeue", job)
    training.wait_for_steps(25, start=2)
    os.kill(cluster.ranks(job)[1], signal.SIGKILL)
    training.wait_for_steps(45, start=3)
    node = cluster.node_of(job, 1)
    cluster.set_node(node, "DOWN")
    try:
        training.wait_for_steps(65, start=4)
        with training.held(1):
            cluster.submit("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
            wait_for(lambda: cluster.show(job)["PreemptTime"] != "None", 600, "pre-emption", training.said)
        check(training, unbroken, restarts=4)
    finally:
        cluster.revive(node)


def test_a_rank_of_a_lost_node_writes_nothing(training: Training, unbroken: Path) -> None:
    """Rank 0, which holds the lock of the run folder, hangs while its node is cut off and the job starts elsewhere."""
    node = training.cluster.node_of(training.job, 0)
    with training.held(0) as orphan:
        training.cluster.cut_off(node)
        try:
            check(training, unbroken)
            before = contents(training.run)
            assert alive(orphan)
            os.kill(orphan, signal.SIGCONT)
            wait_for(lambda: not alive(orphan), 30, "the orphan's end", training.said)
            wait_for(lambda: not training.cluster.processes(node), 600, "the end of its job script", training.said)
            assert contents(training.run) == before
            assert training.cluster.show(training.job)["JobState"] == "COMPLETED"  # its script has not requeued it
        finally:
            training.cluster.revive(node)


def test_a_rank_that_trains_on_is_shut_out(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> None:
    """A job of one rank has no other that would notice; the run is long enough for both starts to be at it at once."""
    run = tmp_path / "run"
    training = Training.submit(cluster, run, arguments(corpus, run, epochs=1000), "--nodes=1", "--ntasks=1")
    training.wait_for_steps(6)
    node, orphan = cluster.node_of(training.job, 0), cluster.ranks(training.job)[0]
    cluster.cut_off(node)

    def taken_over() -> bool:
        lived = alive(orphan)
        if "start 2 since" in (run / "lock").read_text():
            return True
        assert lived, "nothing was to end it before"
        return False

    try:
        wait_for(taken_over, 600, "the second start", training.said)
        wait_for(lambda: not alive(orphan), 30, "the orphan's end", training.said)
        wait_for(lambda: "going on from the checkpoint of step" in training.said(), 600, "its start", training.said)
        done = len(losses(run))
        training.wait_for_steps(done + 6, start=2)
        found = list(losses(run))  # it trains on
        assert found == list(range(len(found)))
    finally:
        cluster("scancel", training.job)
        assert training.end()["JobState"] == "CANCELLED"
        cluster.revive(node)


def test_no_progress_is_no_reason_to_try_again(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> None:
    """A rank dies before the first checkpoint."""
    run = tmp_path / "run"
    training = Training.submit(
        *(cluster, run, [*arguments(corpus, run), "--train.checkpoint_every", "1000"]), "--nodes=1", "--ntasks=1"
    )
    training.wait_for_steps(2)
    os.kill(cluster.ranks(training.job)[0], signal.SIGKILL)
    end = training.end()
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    assert "not requeued: no progress" in training.said()


def test_two_jobs_on_one_run_folder(cluster: Cluster, corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Training.submit(cluster, run, arguments(corpus, run), "--nodes=1", "--ntasks=1")
    first.wait_for_steps(2)
    with first.held(0):
        second = Training.submit(cluster, run, arguments(corpus, run), *TWO_NODES)
        end = second.end()
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    errors = [line for line in second.said().splitlines() if line.startswith("error:")]
    assert len(errors) == 1, second.said()
    assert f"run folder {run} is in use by process" in errors[0]
    assert f"job {first.job} start 1" in errors[0]
    assert first.end()["JobState"] == "COMPLETED"
