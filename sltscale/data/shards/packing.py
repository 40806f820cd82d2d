"""Clips to mp4 bytes in worker processes, in order, whatever a video does to the process that decodes it.

A thread of this process looks after each worker: it hands over one clip at a time and waits for the result, or for a
sign of life at least every CLIP_SECONDS. A worker that crashes or falls silent costs its clip a second try, alone on
the machine, so that lack of memory or a slow disk is not taken for a fault of the video; then the clip is rejected.

Apart from writing.py, so that workers import nothing heavy.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait

import psutil

from sltscale.data.clips import Clip, Cutting
from sltscale.data.video.cutting import Beat, pack_clip
from sltscale.data.video.encoding import PackedClip
from sltscale.data.video.limits import VideoError
from sltscale.errors import InputError

QUEUED_PER_WORKER = 8
# Without a frame out of the decoder.
CLIP_SECONDS = 20
# Address space of a worker above what it has when it starts. The largest pictures need about 1 GiB.
WORKER_BYTES = 4 * 2**30
# Signs of life are no more frequent than this.
BEAT_SECONDS = 1.0


@contextlib.contextmanager
def packing(clips: Sequence[Clip], cutting: Cutting, workers: int) -> Iterator[Iterator[PackedClip | str]]:
    """Each clip packed, or the reason why not, in order.

    The results do not depend on the number of ``workers``. The calling script must be importable without side effects,
    since they are spawned; InputError if they cannot be started.
    """
    team = _Team(cutting, workers)
    # Threads only wait for processes.
    pool = ThreadPoolExecutor(workers)
    try:
        yield _ahead(pool, team, clips, workers * QUEUED_PER_WORKER)
    finally:
        team.dismiss()
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ThreadPoolExecutor, team: _Team, clips: Iterable[Clip], queued: int) -> Iterator[PackedClip | str]:
    """Results in order, with a bounded number of clips under way so that finished ones do not pile up in memory."""
    pending: deque[Future[PackedClip | str]] = deque()
    for clip in clips:
        pending.append(pool.submit(team.pack, clip))
        if len(pending) > queued:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class _Dismissed(Exception):
    """The team is to stop; nobody waits for the result."""


class _Failed(Exception):
    """A worker was lost over a clip; the message is the reason."""


class _Team:
    """Workers that are started when they are needed, and replaced when they are lost."""

    def __init__(self, cutting: Cutting, size: int) -> None:
        self._cutting, self._size = cutting, size
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        # A clip being packed holds a place, and one that is tried again holds all of them. The gate lets the latter
        # gather them.
        self._places, self._gate = threading.Semaphore(size), threading.Lock()
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        self._dismissed = False

    def pack(self, clip: Clip) -> PackedClip | str:
        for places in (1, self._size):
            with self._gate:
                for _ in range(places):
                    self._places.acquire()
            try:
                return self._try(clip)
            except _Failed as error:
                reason = str(error)
            finally:
                self._places.release(places)
        return reason

    def dismiss(self) -> None:
        with self._lock:
            self._dismissed = True
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                worker.ended()

    def _try(self, clip: Clip) -> PackedClip | str:
        worker = self._idle_or_new()
        try:
            result = worker.pack(clip)
        except EOFError:
            raise _Failed(f"the decoder crashed on it ({self._lose(worker)})") from None
        if result is None:
            worker.kill()
            self._lose(worker)
            raise _Failed(f"takes longer than {CLIP_SECONDS} s")
        self._idle.put(worker)
        return result

    def _idle_or_new(self) -> _Worker:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            pass
        # One at a time: while multiprocessing starts a process, it looks after how others have ended.
        with self._lock:
            if self._dismissed:
                raise _Dismissed
            worker = _Worker(self._cutting)
            self._workers.add(worker)
        try:
            worker.receive()
        except EOFError:
            how = self._lose(worker)
            raise InputError(f"a worker process ended while it started ({how}); see what it printed above") from None
        return worker

    def _lose(self, worker: _Worker) -> str:
        """How that worker has ended."""
        with self._lock:
            if self._dismissed:
                raise _Dismissed
            self._workers.remove(worker)
            return worker.ended()


class _Worker:
    """A process that packs one clip after the other."""

    def __init__(self, cutting: Cutting) -> None:
        # Spawned, not forked: the caller may hold threads and locks of torch, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, cutting, WORKER_BYTES), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> PackedClip | str | None:
        """The next message: a result, or None for a sign of life, the first when it is ready. EOFError if it ends."""
        try:
            return self._connection.recv()
        except OSError:
            raise EOFError from None

    def pack(self, clip: Clip) -> PackedClip | str | None:
        """The clip, or the reason why not, or None if nothing was heard for too long. EOFError if the process ends."""
        try:
            self._connection.send(clip)
        except OSError:
            raise EOFError from None
        while self._connection.poll(CLIP_SECONDS):
            message = self.receive()
            if message is not None:
                return message
        return None

    def kill(self) -> None:
        self._process.kill()

    def ended(self) -> str:
        """The signal or exit code with which the process, which no longer answers, ends."""
        self._process.join(1)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _work(connection: Connection, cutting: Cutting, memory: int) -> None:
    follow_parent()
    limit_memory(memory)
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= BEAT_SECONDS:
            last = time.monotonic()
            connection.send(None)

    connection.send(None)
    while True:
        try:
            clip = connection.recv()
        except EOFError:
            return
        last = time.monotonic()
        connection.send(_pack(clip, cutting, beat))


def _pack(clip: Clip, cutting: Cutting, beat: Beat) -> PackedClip | str:
    try:
        return pack_clip(clip, cutting, beat)
    except VideoError as error:
        return str(error)
    except MemoryError:
        return "needs more memory than a worker may have"
    except Exception as error:  # of a kind that no video has raised yet; it shall not stop the others
        return f"cannot be packed: {type(error).__name__}: {' '.join(str(error).split())}"


def limit_memory(more: int) -> None:
    """Let this process's address space grow by at most ``more`` bytes; beyond, allocations fail."""
    now = psutil.Process().memory_info().vms
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it even if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
