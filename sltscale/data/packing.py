"""Clips to mp4 bytes in worker processes, in order. Apart from shards.py, so that workers import nothing heavy."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

from sltscale.data.clips import Clip, Cutting
from sltscale.data.cutting import pack_clip
from sltscale.data.encoding import PackedClip
from sltscale.data.video import VideoError
from sltscale.errors import InputError

QUEUED_PER_WORKER = 8


@contextlib.contextmanager
def packing(clips: Sequence[Clip], cutting: Cutting, workers: int) -> Iterator[Iterator[PackedClip | str]]:
    """Each clip packed, or the reason why not, in order."""
    if workers == 1 or len(clips) < 2:
        yield (_pack(clip, cutting) for clip in clips)
        return
    # Spawned, not forked: the caller may hold threads and locks of torch, which do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=follow_parent)
    try:
        yield _ahead(pool, clips, cutting, workers * QUEUED_PER_WORKER)
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(
    pool: ProcessPoolExecutor, clips: Iterable[Clip], cutting: Cutting, queued: int
) -> Iterator[PackedClip | str]:
    """Results in order, with a bounded number of clips under way so that finished ones do not pile up in memory."""
    pending: deque[tuple[Clip, Future[PackedClip | str]]] = deque()
    for clip in clips:
        pending.append((clip, pool.submit(_pack, clip, cutting)))
        if len(pending) > queued:
            yield _result(*pending.popleft())
    while pending:
        yield _result(*pending.popleft())


def _result(clip: Clip, future: Future[PackedClip | str]) -> PackedClip | str:
    try:
        return future.result()
    except BrokenProcessPool:
        raise InputError(
            f"a worker process died (memory, or a crash in the decoder) at clip {clip.id} of {clip.path} or one of the "
            f"{QUEUED_PER_WORKER} per worker after it; look at that video, or give fewer --workers"
        ) from None


def _pack(clip: Clip, cutting: Cutting) -> PackedClip | str:
    try:
        return pack_clip(clip, cutting)
    except VideoError as error:
        return str(error)


def follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends with it even if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
