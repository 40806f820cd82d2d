"""Clips out of shards as packed batches, read and decoded by background workers in the order of the plan.

Letters: B clips of a batch, N frames of all of them, h x w the crop. Stages, in order: plan -> this rank's share ->
bytes by offset -> the wanted frames decoded -> crop -> packed uint8 [N, 3, h, w] -> handed over, pinned if there is
CUDA. All that is random is drawn from (seed, epoch, clip), so a stream that starts at step s yields what an unbroken
one yields from s on, bit by bit, whatever the number of workers.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sltscale.config import DataSettings
from sltscale.data.augment import choose_frames, clip_generator, crop_corner, frames_after_sampling
from sltscale.data.clips import Clip, Cutting
from sltscale.data.cutting import pack_clip
from sltscale.data.index import Index
from sltscale.data.plan import Plan
from sltscale.data.video import VideoError, decode_clip
from sltscale.errors import InputError
from sltscale.structures import Ragged, VideoBatch

# What a scheduler, a launcher or a terminal sends to every process of a job; the main process decides what to do then.
JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def stream(
    index: Index,
    plan: Plan,
    settings: DataSettings,
    *,
    seed: int,
    rank: int,
    world_size: int,
    first_step: int,
    last_step: int,
    training: bool = True,
) -> Iterator[tuple[int, VideoBatch]]:
    """(step, this rank's share of its global batch) for first_step <= step < last_step, ascending, over epoch ends.

    Clips stand in the order of the plan; ``training`` draws frames and crops by ``seed``, else they are evaluation's.
    Raises InputError at once for more ranks than a batch has clips and for shards of another frame size, and while it
    runs for a clip that cannot be read or is not the indexed one (clip and shard named).
    """
    plan.check_world_size(world_size)
    check_frame_size(index, settings)
    shares = (
        _Share(step, plan.epoch_of(step), plan.share(step, rank, world_size).tolist())
        for step in range(first_step, last_step)
    )
    return _batches(_Clips(index, settings, seed if training else None), shares, last_step - first_step)


def evaluation_batches(index: Index, settings: DataSettings, batches: Sequence[Sequence[int]]) -> Iterator[VideoBatch]:
    """The batches of clip numbers (from ``plan.evaluation_shares``), in order, with the deterministic transforms.

    Raises InputError as ``stream`` does.
    """
    check_frame_size(index, settings)
    shares = (_Share(step, 0, list(clips)) for step, clips in enumerate(batches))
    return (batch for _, batch in _batches(_Clips(index, settings, None), shares, len(batches)))


def load_video(path: Path, settings: DataSettings) -> Tensor:
    """A whole source video as uint8 [T, 3, h, w], as evaluation would get it from a shard: packed, sampled, cropped.

    Raises InputError if it cannot be read or is too long.
    """
    try:
        clip = Clip(path.name, path, None, None, text="", language="", split="")
        packed = pack_clip(clip, Cutting(settings.frame_size))
        frames = decode_clip(packed.data, choose_frames(packed.frames, settings))
    except VideoError as error:
        raise InputError(f"{path}: {error}") from None
    return _crop(frames, settings, None).contiguous()


class _Share(NamedTuple):
    step: int
    epoch: int
    clips: list[int]


class _Packed(NamedTuple):
    """A batch as it crosses the process border: a named tuple, because pinning reaches into tuples only."""

    step: int
    ids: list[str]
    frames: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    texts: list[str]
    languages: list[str]


class _Clips(Dataset["_Packed | InputError"]):
    """Shares to packed batches; lives in the workers. seed None: deterministic transforms."""

    def __init__(self, index: Index, settings: DataSettings, seed: int | None) -> None:
        self.index, self.settings, self.seed = index, settings, seed

    def __getitem__(self, share: _Share) -> _Packed | InputError:
        index = self.index
        lengths = frames_after_sampling(index.frames[share.clips], self.settings).tolist()
        frames = _empty_frames(sum(lengths), self.settings.crop_size)
        start = 0
        for clip, length in zip(share.clips, lengths, strict=True):
            try:
                # torch copies a strided window three times as fast as numpy.
                frames[start : start + length].copy_(self._read(clip, share.epoch))
            except InputError as error:
                return error  # raised here, it would arrive with a traceback for a message
            start += length
        ragged = Ragged.from_lengths(frames, lengths)
        return _Packed(
            share.step,
            [index.id(clip) for clip in share.clips],
            ragged.values,
            ragged.cu_seqlens,
            ragged.max_seqlen,
            [index.text(clip) for clip in share.clips],
            [index.language(clip) for clip in share.clips],
        )

    def _read(self, clip: int, epoch: int) -> Tensor:
        """uint8 [T, 3, h, w] of one clip: the chosen frames, cropped (a view)."""
        index = self.index
        rng = None if self.seed is None else clip_generator(self.seed, epoch, clip)
        keep = choose_frames(int(index.frames[clip]), self.settings, rng)
        try:
            frames = decode_clip(index.video_bytes(clip), keep)
        except VideoError as error:
            path = index.folder / index.shards[int(index.shard[clip])]
            raise InputError(f"{path}: clip {index.key(clip)} (id {index.id(clip)}): {error}") from None
        return _crop(frames, self.settings, rng)


def check_frame_size(index: Index, settings: DataSettings) -> None:
    if index.frame_size != settings.frame_size:
        raise InputError(
            f"{index.path} holds clips of {index.frame_size} pixels, but data.frame_size is {settings.frame_size}; "
            f"set it to {index.frame_size} or pack the clips again"
        )


def _crop(frames: np.ndarray, settings: DataSettings, rng: np.random.Generator | None) -> Tensor:
    """One window for all frames [T, 3, H, W] of a clip, as a view."""
    size = settings.crop_size
    *_, height, width = frames.shape
    top, left = crop_corner(height, width, size, rng if settings.augment == "light" else None)
    return torch.from_numpy(frames)[..., top : top + size, left : left + size]


def _empty_frames(count: int, size: int) -> Tensor:
    """Room for a batch; in a worker straight in shared memory, where it would be copied to on its way otherwise."""
    shape = (count, 3, size, size)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * 3 * size * size)
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _batches(dataset: _Clips, shares: Iterable[_Share], count: int) -> Iterator[tuple[int, VideoBatch]]:
    if count <= 0:
        return
    workers = min(dataset.settings.workers, count)
    loader: DataLoader[_Packed | InputError] = DataLoader(
        dataset,
        sampler=shares,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_end_at_once,
        pin_memory=torch.cuda.is_available(),
        # Not fork: gloo, OpenMP and CUDA threads of the main process may hold locks that a forked child waits for for
        # ever. Not forkserver: its server dies of the signal that a job gets before its end, and all workers with it.
        multiprocessing_context="spawn" if workers else None,
        # Its own generator, or it would draw a seed from torch's global one and change what the training draws next.
        generator=torch.Generator(),
    )
    with _started(loader) as items:
        for item in items:
            if isinstance(item, InputError):
                raise item
            frames = Ragged(item.frames, item.cu_seqlens, item.max_seqlen)
            yield item.step, VideoBatch(item.ids, frames, item.texts, item.languages)


@contextmanager
def _started(loader: DataLoader[_Packed | InputError]) -> Iterator[Iterator[Any]]:
    """The loader's items. Its workers end with the block, with the program, or seconds after a main process is gone."""
    # Workers inherit the blocked signals and never see them. (Starting the resource tracker, which the first worker
    # would do, unblocks some again.)
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        items = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if not loader.num_workers:
        yield items
        return
    assert isinstance(items, _MultiProcessingDataLoaderIter)
    # A program that ends with a stream open would send the workers SIGTERM, to which they are deaf, and wait for ever.
    atexit.register(items._shutdown_workers)
    try:
        yield items
    finally:
        atexit.unregister(items._shutdown_workers)
        items._shutdown_workers()


def _end_at_once(worker: int) -> None:
    """Let a worker leave without tearing down its interpreter.

    Its queue's thread may be inside torch then, which aborts the process, and the loader takes that for a failure (seen
    in about every second stream that was closed before its end).
    """
    atexit.register(os._exit, 0)


def _as_it_is(item: Any) -> Any:
    return item
