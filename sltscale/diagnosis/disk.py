"""The run folder and the file system under it: writable, lockable, large and fast enough, on this host's time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sltscale.config import Recipe
from sltscale.diagnosis.finding import Finding
from sltscale.engine import manifest
from sltscale.engine.run_folder import RunFolder
from sltscale.files import readable_bytes
from sltscale.methods.parameters import count

LEAST_FREE = 2**30  # bytes, where nothing better is known
LEAST_FILES = 1000
WRITTEN = 32 * 2**20  # bytes, to see how fast
SLOW = 5e6  # bytes a second
SKEW_SECONDS = 5.0  # compile locks, caches and attempts are judged by the times of files
FULL = (errno.ENOSPC, errno.EDQUOT)


def use(path: Path, recipe: Recipe | None) -> Iterator[Finding]:
    """Does another process, or a run of another configuration, have the folder?"""
    folder = RunFolder(path)
    if holder := folder.holder():
        yield Finding(f"run folder {path}", "warning", f"in use by {holder}", "wait, or choose another with --run")
    elif recipe is not None:
        folder.check(recipe)
    else:
        folder.stored_recipe()


def run_folder(path: Path, recipe: Recipe | None) -> Iterator[Finding]:
    """The folder, or, if it is not there yet, the nearest one above it, and its file system."""
    subject = f"run folder {path}"
    place = next(there for there in (path, *path.absolute().parents) if there.exists())
    if not place.is_dir():
        yield Finding(subject, "fault", f"{place} is a file", "choose another folder with --run")
        return
    room = _room(place, _needed(path, recipe))
    yield room
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as scratch:
            fault = _lock_fault(Path(scratch) / "lock")
            skew = _skew(Path(scratch) / "clock")
            speed = _speed(Path(scratch) / "speed", min(WRITTEN, shutil.disk_usage(place).free // 2))
    except OSError as error:
        if error.errno not in FULL:
            found = f"cannot be written: {error.strerror}"
            remedy = f"make {place} writable for you (mounted read-only? other owner?), or choose another with --run"
            yield Finding(subject, "fault", found, remedy)
        elif room.state == "ok":
            found = f"no space: {readable_bytes(WRITTEN)} cannot be written in {place}: {error.strerror}"
            yield Finding("free disk", "fault", found, "raise the quota, make room, or choose another with --run")
        return
    if fault is not None:
        remedy = "mount it with locks (Lustre: -o flock), or put runs on another file system"
        yield Finding(subject, "fault", fault, remedy)
    else:
        new = "" if path.exists() else " (will be made)"
        yield Finding(subject, "ok", f"writable, lockable{new}")
    found = f"{speed / 1e6:.0f} MB/s in {place}"
    if speed < SLOW:
        yield Finding("write speed", "warning", found, "put runs on a faster file system")
    else:
        yield Finding("write speed", "ok", found)
    if abs(skew) > SKEW_SECONDS:
        found = f"files in {place} are dated {abs(skew):.0f} s {'before' if skew < 0 else 'after'} this host's time"
        yield Finding("clock", "fault", found, "have this host or the file server follow a time server (chrony)")
    else:
        yield Finding("clock", "ok", f"within {SKEW_SECONDS:.0f} s of the file system's")


def _room(place: Path, needed: int) -> Finding:
    usage = os.statvfs(place)
    free = usage.f_bavail * usage.f_frsize
    if free < needed:
        found = f"no space: {readable_bytes(free)} free in {place}, {readable_bytes(needed)} needed"
        remedy = "make room, lower train.keep_checkpoints, or choose another file system with --run"
        return Finding("free disk", "fault", found, remedy)
    if usage.f_files and usage.f_favail < LEAST_FILES:
        found = f"no space: room for {usage.f_favail} more files in {place}, {LEAST_FILES} needed"
        return Finding("free disk", "fault", found, "delete files there, or choose another file system with --run")
    return Finding("free disk", "ok", f"{readable_bytes(free)} in {place}, {readable_bytes(needed)} needed")


def _needed(path: Path, recipe: Recipe | None) -> int:
    """Bytes that a run still writes: its checkpoints and one more while it saves; those there count as written."""
    there = manifest.folders(path / "checkpoints")
    if recipe is None:
        return max(LEAST_FREE, _bytes_of(there[-1]) if there else 0)
    settings = recipe.train
    kept = settings.keep_checkpoints + (settings.keep_best is not None)
    one = _bytes_of(there[-1]) if there else _checkpoint_bytes(recipe)
    return one * max(1, kept + 1 - len(there)) if one else LEAST_FREE


def _checkpoint_bytes(recipe: Recipe) -> int:
    """Weights and two moments of those that learn, in float32; 0 where pretrained files decide the sizes."""
    if '"pretrained": "' in recipe.to_json():
        return 0
    # As many pseudo-glosses as tokens: their part of the bytes is small.
    _, trainable, total = count(recipe.method, recipe.text.vocabulary, recipe.text.vocabulary).rows[-1]
    return 4 * total + 8 * trainable


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _lock_fault(path: Path) -> str | None:
    """What is wrong with locks there: of whole files, as run folders have them, and of bytes, as shard writers do."""
    try:
        with path.open("w") as first, path.open("w") as second:
            fcntl.lockf(first, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        return "its file system grants one lock twice"
    except OSError as error:
        if error.errno in FULL:
            raise
        return f"its file system does not lock: {error.strerror}"


def _skew(path: Path) -> float:
    """Seconds by which the file system's time is ahead of this host's."""
    before = time.time()
    path.write_bytes(b"x")
    dated, after = path.stat().st_mtime, time.time()
    return max(0.0, dated - after) or min(0.0, dated - before)


def _speed(path: Path, size: int) -> float:
    """Bytes a second, flushed to the disk."""
    block = os.urandom(2**16)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, size // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return file.tell() / max(time.perf_counter() - began, 1e-9)
