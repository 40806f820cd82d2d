"""Killed, signalled, hindered: the same command goes on, and the numbers are those of a run that was left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT, Launcher, kill_group

TRAIN = ROOT / "sltscale/train.py"
ZERO2 = ROOT / "ds_configs/zero2.json"
pytestmark = pytest.mark.multiprocess


def arguments(corpus, run: Path) -> list[str]:
    return ["--deepspeed", str(ZERO2), "--recipe", str(corpus.pretrain), "--run", str(run), "--train.epochs", "8"]


def losses(run: Path) -> dict[int, str]:
    """Step -> its record as text: the numbers are printed so that they read back bit for bit."""
    if not (run / "steps.jsonl").is_file():
        return {}
    lines = (run / "steps.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: line for line in lines}


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def unbroken(corpus, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    launcher = Launcher(environment)
    run = tmp_path_factory.mktemp("unbroken") / "run"
    try:
        launcher.check(TRAIN, arguments(corpus, run), ranks=2)
    finally:
        launcher.end()
    return run


def exported(run: Path) -> bytes:
    return (run / "export/model.safetensors").read_bytes()


def test_killed_in_the_middle_of_an_epoch(corpus, unbroken: Path, launcher: Launcher, tmp_path: Path) -> None:
    """kill -9 to the launcher's process group, twice; 7 steps an epoch, a checkpoint every 4, 56 steps."""
    run = tmp_path / "run"
    for until in (5, 17):
        process = launcher.start(TRAIN, arguments(corpus, run), 2, ROOT)
        wait_for(lambda until=until: (run / "steps.jsonl").is_file() and len(losses_so_far(run)) > until, process)
        kill_group(process)
    output = launcher.check(TRAIN, arguments(corpus, run), ranks=2)
    assert "going on from the checkpoint of step" in output
    assert losses(run) == losses(unbroken)
    assert exported(run) == exported(unbroken)


def losses_so_far(run: Path) -> list[str]:
    return (run / "steps.jsonl").read_text().splitlines()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    number: signal.Signals, corpus, unbroken: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launcher.start(TRAIN, arguments(corpus, run), 2, ROOT)
    wait_for(lambda: (run / "steps.jsonl").is_file() and len(losses_so_far(run)) > 5, process)
    os.kill(rank_process(process, 1), number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output[-3000:]
    assert "Traceback" not in output
    stopped = json.loads((run / "STATUS.json").read_text())
    assert stopped["state"] == "stopped"
    assert (run / f"checkpoints/step-{stopped['step']:08d}/MANIFEST.json").is_file()
    launcher.check(TRAIN, arguments(corpus, run), ranks=2)
    assert losses(run) == losses(unbroken)
    assert exported(run) == exported(unbroken)


def rank_process(launcher_process: subprocess.Popen[str], rank: int) -> int:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if os.getpgid(int(folder.name)) != launcher_process.pid:
                continue
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"--local_rank={rank}".encode() in command and b"spawn_main" not in b"".join(command):
            return int(folder.name)
    raise AssertionError(f"rank {rank} not found")


def test_a_signal_to_one_rank_under_torchrun(corpus, environment: dict[str, str], tmp_path: Path) -> None:
    """torchrun's own exit code is 1 whatever the ranks' were, which it names."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--", str(TRAIN), *arguments(corpus, run)]  # or it takes --run for the start of an option of its own
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for(lambda: (run / "steps.jsonl").is_file() and len(losses_so_far(run)) > 5, process)
        ranks = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
        ranks[0].send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=600)
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()
    assert "exitcode  : 75" in output, output[-3000:]
    stopped = json.loads((run / "STATUS.json").read_text())
    assert stopped["state"] == "stopped"
    assert (run / f"checkpoints/step-{stopped['step']:08d}/MANIFEST.json").is_file()


@pytest.mark.slow
def test_ctrl_c_to_the_whole_group_leaves_a_loadable_checkpoint(corpus, launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launcher.start(TRAIN, arguments(corpus, run), 2, ROOT)
    wait_for(lambda: (run / "steps.jsonl").is_file() and len(losses_so_far(run)) > 5, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    stopped = json.loads((run / "STATUS.json").read_text())
    assert stopped["state"] == "stopped", output[-3000:]
    again = launcher.check(TRAIN, arguments(corpus, run), ranks=1)
    assert f"going on from the checkpoint of step {stopped['step']}" in again


def test_a_planted_compile_lock_is_healed_and_said(corpus, environment: dict[str, str], tmp_path: Path) -> None:
    lock = tmp_path / "extensions/py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    launcher = Launcher(environment | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions/py311_cpu")})
    try:
        run = tmp_path / "run"
        output = launcher.check(TRAIN, [*arguments(corpus, run), "--train.epochs", "1"], ranks=1)
    finally:
        launcher.end()
    assert str(lock) in output
    assert not lock.exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    corpus, unbroken: Path, launcher: Launcher, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "evaluation")
    (run / "STATUS.json").write_text(json.dumps({"state": "stopped", "step": 56, "seconds": 1.0}))
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    damaged = newest / "rank-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    output = launcher.check(TRAIN, arguments(corpus, run), ranks=2)
    assert f"{newest.name}: rank-00000.safetensors does not match its sha256" in output
    assert losses(run) == losses(unbroken)
    assert exported(run) == exported(unbroken)
