"""What was read from afar, kept on this machine: files named by digests, shared by its processes, up to a limit."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from sltscale.errors import InputError

CACHE_FOLDER = Path("~/.cache/sltscale/clips")
CACHE_GB = 50.0
COPIED = 8 << 20  # bytes at a time


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def cache_of_this_machine() -> ClipCache:
    """In $SLTSCALE_CACHE, of $SLTSCALE_CACHE_GB at most."""
    given = os.environ.get("SLTSCALE_CACHE_GB", str(CACHE_GB))
    try:
        limit = float(given) * 1e9
        if not 0 <= limit < 1e18:
            raise ValueError
    except ValueError:
        raise InputError(f"SLTSCALE_CACHE_GB is {given!r}; expected a number of gigabytes from 0 up") from None
    return ClipCache(Path(os.environ.get("SLTSCALE_CACHE") or CACHE_FOLDER).expanduser(), int(limit))


class ClipCache:
    """Files named by digests in a folder that several processes share; those not used for longest make room for others.

    FOLDER/used holds the bytes of all files together, so that they are looked through only when the limit is passed.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.usable = limit > 0
        self._warning = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """None if it is not there, or damaged (after a crash of the machine a file may lack its content)."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        data = content[:-4]
        return data if zlib.crc32(data).to_bytes(4, "little") == content[-4:] else None

    def put(self, key: str, data: bytes) -> None:
        """If it cannot be written, say so once and go on without."""
        if not self.usable or len(data) + 4 > self.limit:
            return
        try:
            with self._room(len(data) + 4), self._new(key) as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(4, "little"))
        except OSError as error:
            with self._warning:
                if self.usable:
                    message = f"{self.folder}: cannot be written ({error.strerror or error}); going on without a cache"
                    print(f"warning: {message}", file=sys.stderr, flush=True)
                self.usable = False

    def whole(self, key: str, size: int, source: Callable[[], io.BufferedReader]) -> Path:
        """The path of a file of ``size`` bytes, copied from ``source()`` if need be; OSError if it cannot be."""
        path = self._path(key)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "copying").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file() and path.stat().st_size == size:
                os.utime(path)
                return path
            with self._room(size):
                pass  # counted; a download takes too long to have the others wait
            with source() as remote, self._new(key) as file:
                shutil.copyfileobj(remote, file, COPIED)
                file.flush()
                os.fsync(file.fileno())
        return path

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    @contextlib.contextmanager
    def _new(self, key: str) -> Iterator[io.BufferedWriter]:
        """A scratch file that becomes ``key`` if the block ends well."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        number, scratch = tempfile.mkstemp(".tmp", dir=path.parent)
        try:
            with open(number, "wb") as file:
                yield file
            os.replace(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Alone, with ``size`` more bytes counted as used; others have gone if that would pass the limit."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "used").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read(20)
            used = int(text) if text.isdigit() else self.limit
            if used + size > self.limit:
                # A tenth more than is needed: looking through a full cache takes a second.
                used = self._remove_down_to(max(0, self.limit - self.limit // 10 - size))
            file.truncate(0)
            file.write(str(used + size).encode())
            file.flush()
            yield

    def _remove_down_to(self, target: int) -> int:
        """Remove what was not used for longest, scratch files of killed processes too; the bytes of what stays."""
        files = []
        for entry in (entry for folder in self.folder.glob("[0-9a-f][0-9a-f]") for entry in os.scandir(folder)):
            with contextlib.suppress(OSError):  # another process may have renamed it
                status = entry.stat(follow_symlinks=False)
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= target:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                used -= size
        return used
