"""Clips out of shards as packed batches, read and decoded by background workers in the order of the plan.

Letters: B clips of a batch, N frames of all of them, h x w the crop. Stages, in order: plan -> this rank's share ->
bytes by offset -> a window of the wanted frames decoded into uint8 [N, 3 h / 2, w] (YUV 4:2:0, see VideoBatch) ->
handed over in shared memory, pinned if there is CUDA; of features, float [N, width] as they are stored. All that is
random is drawn from (seed, epoch, clip), so a stream that starts at step s yields what an unbroken one yields from s
on, bit by bit, whatever the number of workers.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sltscale.config import DataSettings
from sltscale.data.batches.augment import choose_frames, clip_generator, crop_corner
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.segments import Segments, borrow, payload
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.vidaug import Change, change_colours, draw_change, pixel_map
from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards.features import read_tokens
from sltscale.data.shards.remote import retries
from sltscale.data.video.cutting import pack_clip
from sltscale.data.video.limits import VideoError
from sltscale.data.video.stored import decode_pixels, decode_yuv
from sltscale.errors import InputError
from sltscale.structures import Ragged, VideoBatch

# What a scheduler, a launcher or a terminal sends to every process of a job; the main process decides what to do then.
JOB_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def stream(
    clips: Selection,
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
    Raises InputError at once for shards of another frame size, and while it runs for a clip that cannot be read or is
    not the indexed one (clip and shard named).
    """
    reader = _reader(clips, settings, seed if training else None)
    shares = (
        _Share(step, plan.epoch_of(step), plan.share(step, rank, world_size).tolist())
        for step in range(first_step, last_step)
    )
    return _batches(reader, shares, last_step - first_step)


def evaluation_batches(
    clips: Selection, settings: DataSettings, batches: Sequence[Sequence[int]]
) -> Iterator[VideoBatch]:
    """The batches of clip numbers (from ``dealing.evaluation_shares``), in order, with the deterministic transforms.

    Raises InputError as ``stream`` does.
    """
    reader = _reader(clips, settings, None)
    shares = (_Share(step, 0, list(numbers)) for step, numbers in enumerate(batches))
    return (batch for _, batch in _batches(reader, shares, len(batches)))


def load_video(path: Path, settings: DataSettings) -> Tensor:
    """A whole source video as uint8 [T, 3 h / 2, w], as evaluation would get it from a shard: packed, sampled, cropped.

    Raises InputError if it cannot be read or is too long.
    """
    try:
        clip = Clip(path.name, path, None, None, text="", language="", split="")
        packed = pack_clip(clip, Cutting(settings.frame_size))
        draw = _draw(packed.frames, settings, None)
        frames = np.empty((len(draw.keep), *_frame_shape(settings)), np.uint8)
        _decode(packed.data, draw, frames, settings, (packed.width, packed.height))
    except VideoError as error:
        raise InputError(f"{path}: {error}") from None
    return torch.from_numpy(frames)


class _Share(NamedTuple):
    step: int
    epoch: int
    clips: list[int]


class _Draw(NamedTuple):
    """keep: frame numbers. corner: (top, left) of the window."""

    keep: list[int]
    corner: tuple[int, int]
    change: Change


@dataclass(frozen=True)
class _Packed:
    """A batch as it crosses the process border. memory: where its frames lie; a whole segment if ``segment``."""

    step: int
    ids: list[str]
    memory: Tensor
    segment: bool
    frame_shape: tuple[int, ...]
    dtype: torch.dtype
    lengths: list[int]
    texts: list[str]
    languages: list[str]
    retries: int

    def pin_memory(self) -> _Packed:
        """The loader's thread calls this where there is CUDA; the segment is free again as soon as it is copied."""
        return replace(self, memory=self._bytes().pin_memory(), segment=False)

    def video_batch(self) -> VideoBatch:
        frames = self._bytes().view(self.dtype).view(-1, *self.frame_shape)
        ragged = Ragged.from_lengths(frames, self.lengths)
        return VideoBatch(self.ids, ragged, self.texts, self.languages, self.retries)

    def _bytes(self) -> Tensor:
        size = sum(self.lengths) * math.prod(self.frame_shape) * self.dtype.itemsize
        return borrow(self.memory, size) if self.segment else self.memory


class _Clips(Dataset["_Packed | InputError"]):
    """Shares to packed batches; lives in the workers. seed None: deterministic transforms."""

    def __init__(self, clips: Selection, settings: DataSettings, seed: int | None) -> None:
        self.clips, self.settings, self.seed = clips, settings, seed
        self._segments = Segments()

    def __getitem__(self, share: _Share) -> _Packed | InputError:
        clips = self.clips
        draws = [self._draw(clip, share.epoch) for clip in share.clips]
        lengths = [len(draw.keep) for draw in draws]
        shape, dtype = self._layout()
        size = sum(lengths) * math.prod(shape) * dtype.itemsize
        shared = get_worker_info() is not None
        memory = self._segments.take(size) if shared else torch.empty(size, dtype=torch.uint8)
        frames = (payload(memory, size) if shared else memory).view(dtype).numpy().reshape(-1, *shape)
        retries_before = retries()
        clips.prefetch(share.clips)
        start = 0
        for clip, draw in zip(share.clips, draws, strict=True):
            try:
                self._read(clip, draw, frames[start : start + len(draw.keep)])
            except InputError as error:
                return error  # raised here, it would arrive with a traceback for a message
            start += len(draw.keep)
        return _Packed(
            step=share.step,
            ids=[clips.id(clip) for clip in share.clips],
            memory=memory,
            segment=shared,
            frame_shape=shape,
            dtype=dtype,
            lengths=lengths,
            texts=[clips.text(clip) for clip in share.clips],
            languages=[clips.language(clip) for clip in share.clips],
            retries=retries() - retries_before,
        )

    def _layout(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a frame."""
        return _frame_shape(self.settings), torch.uint8

    def _draw(self, clip: int, epoch: int) -> _Draw:
        seed = None if self.settings.augment == "off" else self.seed
        rng = None if seed is None else clip_generator(seed, epoch, clip)
        return _draw(int(self.clips.frames[clip]), self.settings, rng)

    def _read(self, clip: int, draw: _Draw, out: npt.NDArray[Any]) -> None:
        """The chosen frames of one clip, cropped, into ``out`` [T, 3 h / 2, w]."""
        index, number = self.clips.locate(clip)
        width, height = index.resolution[number].tolist()
        try:
            _decode(index.video_bytes(number), draw, out, self.settings, (width, height))
        except VideoError as error:
            raise InputError(f"{index.describe(number)}: {error}") from None


class _Features(_Clips):
    """The same of features: every token as it is stored, whatever the epoch."""

    def _layout(self) -> tuple[tuple[int, ...], torch.dtype]:
        origin = self.clips.indexes[0].features
        assert origin is not None
        return (origin.width,), torch.float32 if origin.dtype == "float32" else torch.float16

    def _draw(self, clip: int, epoch: int) -> _Draw:
        return _Draw(list(range(int(self.clips.frames[clip]))), (0, 0), Change())

    def _read(self, clip: int, draw: _Draw, out: npt.NDArray[Any]) -> None:
        index, number = self.clips.locate(clip)
        out[:] = read_tokens(index, number)


def _reader(clips: Selection, settings: DataSettings, seed: int | None) -> _Clips:
    check_frame_size(clips, settings)
    return (_Clips if settings.features is None else _Features)(clips, settings, seed)


def check_frame_size(clips: Selection, settings: DataSettings) -> None:
    """InputError if these are not the clips that the settings are for: features or video, and of what size."""
    for index in clips.indexes:
        if (index.features is None) != (settings.features is None):
            found, wanted = ("features", "video") if index.features is not None else ("video", "features")
            raise InputError(f"{index.path} holds {found}, expected is {wanted}; give the folder that holds it")
        if index.frame_size != settings.frame_size:
            raise InputError(
                f"{index.path} holds clips of {index.frame_size} pixels, but data.frame_size is "
                f"{settings.frame_size}; set it to {index.frame_size} or pack the clips again"
            )


def _frame_shape(settings: DataSettings) -> tuple[int, int]:
    """Rows and columns of a cropped frame in YUV 4:2:0: Y, then U and V with a quarter of its pixels each."""
    return settings.crop_size * 3 // 2, settings.crop_size


def _draw(num_frames: int, settings: DataSettings, rng: np.random.Generator | None) -> _Draw:
    keep = choose_frames(num_frames, settings, rng)
    corner = crop_corner(settings.frame_size, settings.frame_size, settings.crop_size, rng)
    return _Draw(keep, corner, Change() if rng is None else draw_change(settings.augment, rng))


def _decode(
    data: bytes,
    draw: _Draw,
    out: npt.NDArray[np.uint8],
    settings: DataSettings,
    resolution: tuple[int, int],
) -> None:
    """One window and one change for all frames of a clip, into ``out``."""
    if draw.change.moves:
        pixels = pixel_map(draw.change, settings.frame_size, settings.crop_size, draw.corner, resolution)
        decode_pixels(data, draw.keep, out.reshape(len(out), -1), settings.frame_size, pixels)
    else:
        decode_yuv(data, draw.keep, out, *draw.corner)
    if draw.change.recolours:
        change_colours(out, draw.change)


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
            yield item.step, item.video_batch()


@contextmanager
def _started(loader: DataLoader[_Packed | InputError]) -> Iterator[Iterator[Any]]:
    """The loader's items. Its workers end with the block, with the program, or seconds after a main process is gone."""
    # Workers and the resource tracker inherit the blocked signals and never see them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)  # starting the tracker unblocks some
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
