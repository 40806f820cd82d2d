"""Compile locks that a killed process left behind in torch's extension cache, found and healed at the start.

DeepSpeed compiles its C++ ops on first use through ``torch.utils.cpp_extension``. Up to torch 2.13 a compiling process
creates a file ``lock`` in the extension's build folder and removes it at the end (``torch.utils.file_baton``); the
others wait until the file is gone. A process killed in between leaves it there, and every later start waits for ever
without a word (pytorch/pytorch#189245).

The compiling process keeps the file open while it holds it, so a lock that no process of this host has open belongs to
nobody. Two cases cannot be told by looking at processes - a cache on a network file system, where another host may
compile, and a lock of another user, whose open files are hidden - so there a lock counts as left behind only when
nothing in the build folder has changed for ten minutes. Processes in a container of its own with the same cache
mounted are not seen either: give every container its own TORCH_EXTENSIONS_DIR.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from sltscale.errors import InputError

QUIET_SECONDS = 600.0
# The baton is closed shortly before it is removed; a healthy lock seen in that gap is gone at the second look.
SECOND_LOOK_SECONDS = 1.0
# How long a ninja that outlived the process which started it may go on; two in one folder spoil each other's files.
ORPHAN_SECONDS = 20.0
NETWORK_FILE_SYSTEMS = frozenset(
    {"afs", "beegfs", "ceph", "cephfs", "cifs", "fhgfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs"}
    | {"panfs", "pvfs2", "quobyte", "smb3", "smbfs", "sshfs", "wekafs"}
)


def heal_stale_compile_locks(cache: Path | None = None) -> list[str]:
    """Remove compile locks whose owner is gone; returns one line for every lock found: its path, age, what was done.

    cache: folder of extension build folders; by default the one torch uses (TORCH_EXTENSIONS_DIR or the user's cache).
    Returns an empty list when there is no lock, without delay. Several processes may call it at once. Raises
    InputError if a compiler whose owner is gone still runs after 20 s.
    """
    folder = cache if cache is not None else _default_cache()
    if not _locks(folder):
        return []
    with _alone(folder):
        for lock in _locks(folder):
            _wait_for_orphan(lock)
        first_look = {lock: _identity(lock) for lock in _locks(folder) if _reason_to_keep(lock) is None}
        if first_look:
            time.sleep(SECOND_LOOK_SECONDS)
        return [line for lock in _locks(folder) if (line := _heal(lock, first_look.get(lock)))]


def locks_left_behind(cache: Path | None = None) -> list[Path]:
    """Compile locks whose owner is gone, looked at twice; nothing is removed. cache: as above."""
    folder = cache if cache is not None else _default_cache()
    first_look = {lock: _identity(lock) for lock in _locks(folder) if _reason_to_keep(lock) is None}
    if first_look:
        time.sleep(SECOND_LOOK_SECONDS)
    return [
        lock
        for lock, before in first_look.items()
        if before is not None and _identity(lock) == before and _reason_to_keep(lock) is None
    ]


def compile_locks() -> list[Path]:
    """The compile locks in torch's extension cache, whether in use or left behind."""
    return _locks(_default_cache())


def _heal(lock: Path, identity_before: tuple[int, int] | None) -> str | None:
    """One line, or None if the lock has gone by itself meanwhile."""
    identity, reason = _identity(lock), _reason_to_keep(lock)
    if identity is None:
        return None
    age = f"{max(time.time() - identity[1] / 1e9, 0):.0f} s old"
    if reason is None and identity != identity_before:
        reason = "taken a moment ago"
    if reason is not None:
        return f"compile lock {lock} ({age}) kept: {reason}"
    try:
        lock.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"compile lock {lock} ({age}) is left over but cannot be removed ({error.strerror}); remove it by hand"
    return f"compile lock {lock} ({age}) was left behind by a process that is gone: removed, compiling starts again"


def _wait_for_orphan(lock: Path) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    while _owner(lock) is None and (ninja := _ninja(lock.parent)):
        if time.monotonic() > deadline:
            raise InputError(
                f"compile lock {lock} was left behind by a process that is gone, but the compiler it started "
                f"(process {ninja.pid}, ninja) still runs; wait until it has finished or end it, then start again"
            )
        time.sleep(0.2)


def _reason_to_keep(lock: Path) -> str | None:
    """Why the lock may be in use, or None if its owner is gone."""
    owner = _owner(lock)
    if owner is not None:
        return f"process {owner.pid} ({_name(owner)}) is compiling, this start waits for it"
    try:
        foreign = os.geteuid() not in (0, lock.stat().st_uid)
        quiet = time.time() - max(path.stat().st_mtime for path in (lock, lock.parent, *lock.parent.iterdir()))
    except FileNotFoundError:
        return "changing"
    file_system = _file_system(lock)
    shared = file_system.removeprefix("fuse.") in NETWORK_FILE_SYSTEMS
    if (shared or foreign) and quiet < QUIET_SECONDS:
        where = f"another host (the cache is on {file_system})" if shared else "a process of another user"
        return (
            f"{where} may be compiling, the folder changed {quiet:.0f} s ago; "
            f"a start after {QUIET_SECONDS:.0f} quiet seconds removes it, or remove it by hand if nobody compiles"
        )
    return None


def _owner(lock: Path) -> psutil.Process | None:
    """The living process that holds the lock open, as far as this process may look."""
    path = os.path.realpath(lock)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == path for file in process.open_files()):
                return process
    return None


def _ninja(build_folder: Path) -> psutil.Process | None:
    """A ninja at work in the folder (torch starts it there)."""
    path = os.path.realpath(build_folder)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "ninja" and process.cwd() == path:
                return process
    return None


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "just ended"


def _file_system(path: Path) -> str:
    """Type of the file system that holds ``path``, e.g. "ext4"; empty if unknown."""
    real = Path(os.path.realpath(path))
    mounts = [m for m in psutil.disk_partitions(all=True) if real.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else ""


def _identity(lock: Path) -> tuple[int, int] | None:
    """(inode, modification time in ns): changes when a lock is given back and taken again."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _locks(cache: Path) -> list[Path]:
    """torch's default cache has one more level (Python and CUDA version) than TORCH_EXTENSIONS_DIR."""
    return sorted(path for depth in ("*/lock", "*/*/lock") for path in cache.glob(depth) if path.is_file())


def _default_cache() -> Path:
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    if configured:
        return Path(configured)
    from torch.utils.cpp_extension import get_default_build_root  # slow to import, and only needed here

    return Path(get_default_build_root())


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Healers of one host take turns: a second one must not remove the lock taken after the first one healed."""
    descriptor = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # NFS cannot lock folders; there the ten quiet minutes must do
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
