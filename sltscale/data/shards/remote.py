"""Where shards lie: in a folder, or behind an https or s3 URL, with a cache of what was read on this machine.

``shard_source`` gives both the same methods. What fails for a reason that may pass is tried again, with a warning on
stderr. Behind a URL the unit is a range of bytes, one clip: it is fetched by fsspec and kept in a folder that all
processes of the machine share, up to a limit. So a machine downloads what its own ranks read, once. Cache files are
named by digests and renamed into place when they are whole, so nobody ever sees half of one.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from sltscale.data.clips import SPLITS
from sltscale.data.shards.clip_cache import cache_of_this_machine, digest
from sltscale.errors import InputError

OPEN_SHARDS = 64
THREADS = 8
TRIES = 5
FIRST_PAUSE = 0.5  # seconds between tries; doubled each time
# What a network file system gives while its server starts again, fails over or is out of reach.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN}
_RETRIES: list[None] = []  # one for each; appending is safe from several threads
CONNECT_SECONDS, READ_SECONDS, REQUEST_SECONDS = 10.0, 30.0, 300.0
PART = 8 << 20  # bytes that a request asks for at most, when a whole file is read

T = TypeVar("T")
Range = tuple[str, int, int]  # file name, offset, size

_HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?"
_URL = re.compile(rf"(?P<scheme>https?|s3)://(?P<host>{_HOST})(?P<path>(/[A-Za-z0-9._~+=,-]+)*)/?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,250}")


def shard_source(where: str | Path) -> LocalShards | RemoteShards:
    """The files of a folder (given as a path) or behind ``https://HOST/PATH`` or ``s3://BUCKET/PATH``.

    Opens no connection yet. InputError for any other kind of URL, or one with anything but plain characters in it;
    plain http is for this machine only (localhost, 127.0.0.1). Nothing in a path or URL is ever expanded.
    """
    return RemoteShards(str(where)) if _SCHEME.match(str(where)) else LocalShards(Path(where))


class LocalShards:
    """The files of one folder. May be shared by threads and sent to other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., LocalShards], tuple[Path]]:
        return LocalShards, (self.folder,)

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Fewer bytes if the file ends before; InputError if it cannot be read, in TRIES tries where that may pass."""
        for number in range(1, TRIES + 1):
            try:
                return self._descriptor(name).read(offset, size)
            except OSError as error:
                if error.errno not in PASSING or number == TRIES:
                    times = f", {number} times" if number > 1 else ""
                    complaint = f"{error.strerror}{times}; see sltscale shards verify"
                    raise InputError(f"shard {self.folder / name}: {complaint}") from None
                _wait_to_try_again(str(self.folder / name), str(error.strerror), number)
                with self._opening:
                    self._open.pop(name, None)  # what is stale stays so
        raise AssertionError

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Have the system read ahead; returns at once. What cannot be read is left to ``read`` to report."""
        for name, offset, size in ranges:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor(name).number, offset, size, os.POSIX_FADV_WILLNEED)

    def open(self, name: str) -> io.BufferedReader:
        """For reading from the beginning; OSError if it cannot be opened."""
        return (self.folder / name).open("rb")

    def local_copy(self, name: str) -> Path:
        return self.folder / name

    def size(self, name: str) -> int | None:
        """Bytes; None if there is no such file; OSError if that cannot be told."""
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, pattern: str) -> list[str]:
        """File names that match, sorted; ``*`` stands for any characters."""
        return sorted(path.name for path in self.folder.glob(pattern))

    def _descriptor(self, name: str) -> _Descriptor:
        with self._opening:
            file = self._open.pop(name, None) or _Descriptor(os.open(self.folder / name, os.O_RDONLY))
            self._open[name] = file
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return file


class _Descriptor:
    """Positioned reads share no file offset, so forked processes and threads may use the same descriptor."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        size = min(size, os.fstat(self.number).st_size - offset)  # or what a false index asks for would be allocated
        while size > 0 and (part := os.pread(self.number, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        os.close(self.number)


class RemoteShards:
    """The files behind one URL. May be shared by threads and forked processes, and sent to others; connects late.

    Every request has a time limit and is tried TRIES times, with pauses, if it fails for a reason that may pass: no
    connection, a stall, an answer that breaks off, statuses 408, 429 and from 500. All others, and the last failure,
    are an InputError that names URL and reason.
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self._cache = cache_of_this_machine()
        self._facts: dict[str, tuple[int, str]] = {}
        self._connection: tuple[int, _Client | None] = (-1, None)

    def __reduce__(self) -> tuple[Callable[..., RemoteShards], tuple[str]]:
        return RemoteShards, (self.url,)

    def address(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise InputError(f"{self.url}: file name {name!r}; expected letters, digits, dots, hyphens, underscores")
        return f"{self.url}/{name}"

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes, never fewer; InputError if the file is not there or ends before."""
        total, version = self._known(name)
        if offset + size > total:
            raise InputError(
                f"{self.address(name)}: has {total} bytes, but bytes up to {offset + size} are wanted; "
                "expected the file that was indexed, see sltscale shards verify"
            )
        key = digest(self.address(name), version, str(offset), str(size))
        data = self._cache.get(key)
        if data is None or len(data) != size:
            data = self._fetch(name, offset, size, total)
            self._cache.put(key, data)
        return data

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Read them into the cache, several at once. What cannot be read is left to ``read`` to report."""

        def fetch(wanted: Range) -> None:
            with contextlib.suppress(InputError):
                self.read(*wanted)

        if self._cache.usable:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(fetch, ranges))

    def open(self, name: str) -> io.BufferedReader:
        """For reading from the beginning, past the cache."""
        total, _ = self._known(name)
        return io.BufferedReader(_Sequential(partial(self._fetch, name, total=total), total), PART)

    def local_copy(self, name: str) -> Path:
        """A file's copy in the cache, downloaded unless it is there: whole, by one process, while others wait."""
        total, version = self._known(name)
        try:
            return self._cache.whole(digest(self.address(name), version, "whole"), total, lambda: self.open(name))
        except OSError as error:
            raise InputError(
                f"{self._cache.folder}: cannot be written ({error.strerror or error}); {total} bytes are needed for "
                f"{self.address(name)}; make room, or set SLTSCALE_CACHE to another folder"
            ) from None

    def size(self, name: str) -> int | None:
        """Bytes, asked anew; None if there is no such file."""
        self._facts.pop(name, None)
        try:
            return self._known(name)[0]
        except _MissingError:
            return None

    def names(self, pattern: str) -> list[str]:
        """File names that match, sorted. https servers have no listing: there ``*`` stands for a usual split only."""
        if not self.url.startswith("s3:"):
            return sorted(name for split in SPLITS if self.size(name := pattern.replace("*", split)) is not None)
        try:
            found = self._persist(self.url, lambda files: files.ls(self.url, detail=False))
        except _MissingError:
            return []
        names = (path.rpartition("/")[2] for path in found)
        return sorted(name for name in names if _NAME.fullmatch(name) and fnmatchcase(name, pattern))

    def _known(self, name: str) -> tuple[int, str]:
        """Size, and what tells this version of the file from others; asked once per process."""
        facts = self._facts.get(name)
        if facts is None:
            address = self.address(name)
            info = self._persist(address, lambda files: files.info(address))
            if info["type"] != "file" or info["size"] is None:
                raise InputError(f"{address}: the server tells no size; expected a file on a server that does")
            version = [str(info.get(fact)) for fact in ("size", "ETag", "Last-Modified", "LastModified")]
            facts = self._facts[name] = int(info["size"]), " ".join(version)
        return facts

    def _fetch(self, name: str, offset: int, size: int, total: int) -> bytes:
        address = self.address(name)

        def attempt(files: Any) -> bytes:
            with files.open(address, cache_type="none", size=total) as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) != size:
                raise EOFError(f"{len(data)} bytes of {size}")
            return bytes(data)

        return self._persist(address, attempt)

    def _persist(self, address: str, attempt: Callable[[Any], T]) -> T:
        """What ``attempt`` makes of a connected file system, after as many tries as it takes."""
        client = self._client()
        reason = ""
        for number in range(TRIES):
            if number:
                _wait_to_try_again(address, reason, number)
            try:
                return attempt(client.filesystem)
            except client.errors as raised:
                error = _without_disguise(raised)
                status = _status(error)
                if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
                    raise _MissingError(f"{address}: not found (404); see sltscale shards verify") from None
                reason = f"status {status}" if status else _described(error)
                if not _may_pass(error, status, client.transient):
                    raise InputError(
                        f"{address}: {reason}; expected a server that gives out this file, in byte ranges, with the "
                        "credentials that this environment has for it"
                    ) from None
        raise InputError(f"{address}: {reason}, {TRIES} times; check network and server, or copy the shards to a disk")

    def _client(self) -> _Client:
        """One for each process: fsspec's background thread does not survive a fork."""
        process, client = self._connection
        if client is None or process != os.getpid():
            client = _connect(self.url.partition(":")[0])
            self._connection = os.getpid(), client
        return client


class _MissingError(InputError):
    """The server knows no such file."""


@dataclass(frozen=True)
class _Client:
    """filesystem: fsspec's. errors: what it raises; transient: those of them that may pass."""

    filesystem: Any
    errors: tuple[type[Exception], ...]
    transient: tuple[type[Exception], ...]


def _connect(scheme: str) -> _Client:
    transient: tuple[type[Exception], ...] = (OSError, EOFError)
    try:
        aiohttp, fsspec = import_module("aiohttp"), import_module("fsspec")
        if scheme == "s3":
            boto = import_module("botocore.exceptions")
            once: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
            once["retries"] = {"total_max_attempts": 1}
            filesystem = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=once)
            filesystem.retries = 1  # five by itself, each within the time limits
            transient += (aiohttp.ClientError, boto.HTTPClientError, boto.ConnectionError)
            return _Client(filesystem, (*transient, ValueError, boto.BotoCoreError, boto.ClientError), transient)
        limits = aiohttp.ClientTimeout(REQUEST_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        session = {"timeout": limits, "trust_env": True}
        headers = {"Accept-Encoding": "identity"}  # or a range may come compressed
        filesystem = fsspec.filesystem(scheme, skip_instance_cache=True, client_kwargs=session, headers=headers)
        transient += (aiohttp.ClientError,)
        return _Client(filesystem, (*transient, ValueError), transient)
    except ImportError as error:
        package = error.name or "s3fs"
        raise InputError(f'{scheme} shards need {package}; install it: pip install "sltscale[remote]"') from None


def retries() -> int:
    """Reads that this process has had to try again so far."""
    return len(_RETRIES)


def _wait_to_try_again(address: str, reason: str, number: int) -> None:
    """After try ``number``, counted from 1."""
    _RETRIES.append(None)
    where = socket.gethostname()
    print(f"warning: {where}: {address}: {reason}; try {number} of {TRIES}", file=sys.stderr, flush=True)
    # The operating system's randomness: the generators' states belong to the training.
    time.sleep(FIRST_PAUSE * 2 ** (number - 1) * (0.5 + secrets.randbelow(1000) / 2000))


def _without_disguise(error: BaseException) -> BaseException:
    """fsspec says FileNotFoundError of whatever keeps it from asking for a size."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error or its cause speaks of, in aiohttp's form or botocore's."""
    while error is not None:
        response = getattr(error, "response", None)
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        if status := found or getattr(error, "status", None):
            return int(status)
        error = error.__cause__
    return None


def _may_pass(error: BaseException, status: int | None, transient: tuple[type[Exception], ...]) -> bool:
    if status:
        return status in (408, 429) or status >= 500
    # ValueError: a false certificate, an impossible URL, or an answer that is not the range that was asked for.
    return isinstance(error, transient) and not isinstance(error, (PermissionError, ValueError))


def _described(error: BaseException) -> str:
    """Its kind, but not its text, which may hold the address that a redirect led to, signature and all."""
    if isinstance(error, EOFError):
        return str(error)
    return "no answer in byte ranges" if type(error) is ValueError else type(error).__name__


class _Sequential(io.RawIOBase):
    """A remote file from begin to end; ``fetch(offset, size)`` gives its bytes."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._fetch, self._size, self._position = fetch, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), PART, self._size - self._position)
        data = self._fetch(self._position, wanted) if wanted else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _checked(url: str) -> str:
    """The URL without a slash at its end; InputError, in which no credentials show, if it is not allowed."""
    scheme = url.partition(":")[0]
    shown = f"{scheme}:..." if "@" in url or "?" in url or scheme not in ("http", "https", "s3") else repr(url)
    parts = _URL.fullmatch(url)
    if scheme not in ("http", "https", "s3"):
        fault = f"scheme {scheme!r} is not allowed"
    elif "@" in url:
        fault = "credentials do not belong into it, but into the client's own files or variables"
    elif not parts:
        fault = "not a plain URL: letters, digits and . _ ~ + = , - only"
    elif {".", ".."} & set(parts["path"].split("/")):
        fault = "leads upwards by . or .."
    elif scheme == "http" and parts["host"].partition(":")[0] not in ("localhost", "127.0.0.1"):
        fault = "plain http is for localhost only"
    else:
        return url.rstrip("/")
    raise InputError(f"shards {shown}: {fault}; expected a folder, https://HOST/PATH or s3://BUCKET/PATH")
