"""Stale compile locks are healed and said so; locks in use stay. The locks are taken by torch's own code."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sltscale.engine import compile_lock
from sltscale.engine.compile_lock import heal_stale_compile_locks
from sltscale.errors import InputError

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
sys.stdin.read()  # until the parent closes the pipe
baton.release()
"""


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that compiles, as far as its lock tells."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_lock_of_a_killed_process_is_healed(tmp_path: Path) -> None:
    lock = tmp_path / "shm_comm" / "lock"
    with holder(lock) as process:
        kill(process)
        assert lock.exists()  # this is what hangs every later start
        started = time.monotonic()
        lines = heal_stale_compile_locks(tmp_path)
    assert not lock.exists()
    assert time.monotonic() - started < 30
    assert len(lines) == 1
    assert re.fullmatch(rf"compile lock {lock} \(\d+ s old\) was left behind .*: removed, .*", lines[0])
    assert heal_stale_compile_locks(tmp_path) == []


def test_lock_of_a_living_process_is_kept(tmp_path: Path) -> None:
    lock = tmp_path / "shm_comm" / "lock"
    with holder(lock) as process:
        lines = heal_stale_compile_locks(tmp_path)
        assert lock.exists()
        assert len(lines) == 1
        assert f"{lock} " in lines[0] and f"kept: process {process.pid} (" in lines[0]
        process.communicate()  # ends in order: the baton removes its lock
    assert process.returncode == 0
    assert not lock.exists()


def test_stale_and_living_side_by_side_through_a_link(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    linked = tmp_path / "link"
    linked.symlink_to(cache)
    stale = cache / "py311_cpu" / "fused_adam" / "lock"  # torch's default cache has one more level
    stale.parent.mkdir(parents=True)
    stale.touch()
    (stale.parent / "build.ninja").touch()
    with holder(cache / "shm_comm" / "lock"):
        lines = heal_stale_compile_locks(linked)
        assert (cache / "shm_comm" / "lock").exists()
    assert not stale.exists() and (stale.parent / "build.ninja").exists()
    assert sorted("removed" in line for line in lines) == [False, True]


def test_default_cache_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "set"))
    build_folder = Path(cpp_extension._get_build_directory("some_op", False))
    (build_folder / "lock").touch()
    assert len(heal_stale_compile_locks()) == 1
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    build_folder = Path(cpp_extension._get_build_directory("some_op", False))
    assert build_folder.is_relative_to(tmp_path / "home")
    (build_folder / "lock").touch()
    assert len(heal_stale_compile_locks()) == 1
    assert not (build_folder / "lock").exists()


def test_no_cache_and_no_lock_say_nothing_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(compile_lock.time, "sleep", waited.append)
    assert heal_stale_compile_locks(tmp_path / "missing") == []
    (tmp_path / "op" / "lock").mkdir(parents=True)  # a folder of that name is no lock
    assert heal_stale_compile_locks(tmp_path) == []
    assert waited == []


def test_several_ranks_at_once(tmp_path: Path) -> None:
    locks = [tmp_path / name / "lock" for name in ("a", "b")]
    for lock in locks:
        lock.parent.mkdir()
        lock.touch()
    code = (
        "import sys; from pathlib import Path; from sltscale.engine.compile_lock import heal_stale_compile_locks as h\n"
    )
    code += "for line in h(Path(sys.argv[1])): print(line)"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert not any(lock.exists() for lock in locks)
    for lock in locks:
        assert sum(f"{lock} " in line for output in outputs for line in output.splitlines()) == 1


def test_healers_take_turns(tmp_path: Path) -> None:
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # as another rank's healer does
    lines: list[str] = []
    healer = threading.Thread(target=lambda: lines.extend(heal_stale_compile_locks(tmp_path)))
    healer.start()
    time.sleep(2 * compile_lock.SECOND_LOOK_SECONDS)
    assert healer.is_alive() and lock.exists()
    os.close(other)
    healer.join(timeout=600)
    assert not lock.exists() and len(lines) == 1


def test_lock_taken_during_the_second_look_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the stale one goes and another process takes it, as when another host's start healed it a moment before
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()

    def replace(_seconds: float) -> None:
        fresh = lock.with_name("fresh")
        fresh.touch()
        fresh.replace(lock)

    monkeypatch.setattr(compile_lock.time, "sleep", replace)  # between the two looks
    lines = heal_stale_compile_locks(tmp_path)
    assert lock.exists()
    assert len(lines) == 1 and "taken a moment ago" in lines[0]


def test_on_a_network_file_system_only_ten_quiet_minutes_make_it_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = compile_lock.psutil.disk_partitions(all=True)
    nfs = mounts[0]._replace(device="server:/home", mountpoint=str(tmp_path.resolve()), fstype="nfs4")
    monkeypatch.setattr(compile_lock.psutil, "disk_partitions", lambda all: [*mounts, nfs])
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    long_ago = time.time() - compile_lock.QUIET_SECONDS - 60
    os.utime(lock, (long_ago, long_ago))
    lines = heal_stale_compile_locks(tmp_path)  # the folder itself has just changed
    assert lock.exists()
    assert len(lines) == 1 and "another host (the cache is on nfs4) may be compiling" in lines[0]
    os.utime(lock.parent, (long_ago, long_ago))
    assert "removed" in heal_stale_compile_locks(tmp_path)[0]
    assert not lock.exists()


def test_a_compiler_that_outlived_its_owner_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    ninja = tmp_path / "ninja"  # any program of that name at work in the folder
    shutil.copy2("/bin/sleep", ninja)
    orphan = subprocess.Popen([str(ninja), "30"], cwd=lock.parent)
    try:
        monkeypatch.setattr(compile_lock, "ORPHAN_SECONDS", 0.5)
        with pytest.raises(InputError, match=rf"compile lock {lock} .*process {orphan.pid}, ninja\) still runs"):
            heal_stale_compile_locks(tmp_path)
        assert lock.exists()
    finally:
        orphan.kill()
        orphan.wait()
    assert "removed" in heal_stale_compile_locks(tmp_path)[0]


def test_file_system_of_a_folder(tmp_path: Path) -> None:
    assert compile_lock._file_system(Path("/proc/self")) == "proc"
    assert compile_lock._file_system(tmp_path)
