"""The stream against its limit and against the field: python tools/bench_stream.py [--videos FILE ...] [--rounds N].

Three readers take the same clips, in turn, in the same run, each with the same number of processes:

  decoder  bare PyAV decode loops over the stored clips: the limit, nothing is done with the frames
  stream   sltscale's: read by offset, check, decode, random window, packed batches in the main process
  png      how the field's trainers read: a DataLoader over a folder of PNG frames per clip, each opened, resized to
           256, cropped to 224, made a normalised float32 tensor, stacked; batches padded to the longest clip

Figures are frames per second of wall time (median over the rounds) and ratios; only ratios are worth comparing.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from typing import get_args

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sltscale.config import Augment, DataSettings
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import stream
from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards.index import Index, open_index
from sltscale.data.shards.writing import write_shards
from sltscale.data.synthetic.corpus import make_corpus
from sltscale.data.video.cutting import source_frames
from sltscale.errors import InputError

FRAME_SIZE, CROP_SIZE, BATCH = 256, 224, 8
PNG_SIZE = (210, 260)  # width, height of PHOENIX-2014T's frames
SECONDS = 4  # of each clip
PASSES = 10  # over the clips in a round, for the two quick readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, nargs="+", help="footage to cut up (default: drawn signing)")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--augment", choices=get_args(Augment), default="light", help="of the stream")
    arguments = parser.parse_args()
    if arguments.clips < 2 * BATCH * arguments.workers:
        parser.error(
            f"--clips {arguments.clips}: expected at least {2 * BATCH * arguments.workers}, two batches a worker"
        )
    with tempfile.TemporaryDirectory() as folder:
        index, frames = _prepare(Path(folder), arguments.videos, arguments.clips, arguments.workers)
        size = int(index.size.sum())
        print(
            f"{len(index)} clips, {frames} frames of {FRAME_SIZE} px, {size / frames:.0f} bytes a frame; "
            f"{arguments.workers} workers, {arguments.rounds} rounds"
        )
        context = get_context("spawn")
        with context.Pool(arguments.workers) as pool:
            readers: dict[str, Callable[[], float]] = {
                "decoder": lambda: _time_decoder(pool, index, arguments.workers),
                "stream": lambda: _time_stream(index, arguments.workers, arguments.augment),
                "png": lambda: _time_png(Path(folder) / "png", arguments.workers),
            }
            rates: dict[str, list[float]] = {name: [] for name in readers}
            for _ in range(arguments.rounds):
                for name, read in readers.items():
                    rates[name].append(read())
    _report(rates)


def _report(rates: dict[str, list[float]]) -> None:
    median = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name:8s} {median[name]:8.0f} frames/s  ({min(values):.0f} to {max(values):.0f})")
    for other in ("decoder", "png"):
        ratios = [a / b for a, b in zip(rates["stream"], rates[other], strict=True)]
        print(f"stream / {other}: {statistics.median(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")


def _prepare(folder: Path, videos: list[Path] | None, count: int, workers: int) -> tuple[Index, int]:
    """Shards and folders of PNG frames of the same clips."""
    if videos:
        clips = _pieces(videos, count)
    else:
        make_corpus(folder / "drawn", clips=max(40, count), seed=0, workers=workers)
        clips = _pieces(sorted((folder / "drawn" / "videos").iterdir()), count)
    print(f"packing {len(clips)} clips ...", flush=True)
    write_shards(
        clips,
        [],
        folder / "shards",
        split="train",
        corpus="bench",
        cutting=Cutting(FRAME_SIZE),
        workers=workers,
        progress=False,
    )
    index = open_index(folder / "shards", "train")
    with get_context("spawn").Pool(workers) as pool:
        pool.starmap(_write_png, [(clip, folder / "png" / f"{number:06d}") for number, clip in enumerate(clips)])
    return index, int(index.frames.sum())


def _pieces(videos: list[Path], count: int) -> list[Clip]:
    """Pieces of SECONDS of the videos, over and over, until there are ``count``."""
    pieces: list[Clip] = []
    for path in videos:
        times = [frame.pts * frame.time_base for frame in source_frames(path, size=16)]
        length = Fraction(SECONDS)
        starts = [k * length for k in range(max(1, int((times[-1] - times[0]) / length)))]
        pieces += [Clip("", path, start, min(start + length, times[-1]), "text", "de", "train") for start in starts]
    if not pieces:
        raise InputError("no pieces could be cut from the videos")
    chosen = [pieces[k % len(pieces)] for k in range(count)]
    return [
        Clip(f"clip-{k}", clip.path, clip.start, clip.end, clip.text, "de", "train") for k, clip in enumerate(chosen)
    ]


def _write_png(clip: Clip, folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(source_frames(clip.path, start=clip.start, end=clip.end)):
        picture = Image.fromarray(frame.rgb).resize(PNG_SIZE, Image.Resampling.BILINEAR)
        picture.save(folder / f"images{number + 1:04d}.png")


def _time_decoder(pool: Pool, index: Index, workers: int) -> float:
    clips = [index.video_bytes(clip) for clip in range(len(index))]
    parts = [clips[k::workers] for k in range(workers)]
    pool.map(_decode, [part[:1] for part in parts], chunksize=1)  # every process has its imports done
    started = time.perf_counter()
    frames = sum(pool.map(_decode, [part * PASSES for part in parts], chunksize=1))
    return frames / (time.perf_counter() - started)


def _decode(clips: list[bytes]) -> int:
    frames = 0
    for data in clips:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            for _ in container.decode(stream):
                frames += 1
    return frames


def _time_stream(index: Index, workers: int, augment: Augment) -> float:
    settings = DataSettings(
        shards=str(index.folder),
        frame_size=FRAME_SIZE,
        crop_size=CROP_SIZE,
        global_batch=BATCH,
        workers=workers,
        augment=augment,
    )
    plan = Plan(index.frames, 0, BatchRule.of(settings))
    batches = stream(
        Selection([index]), plan, settings, seed=0, rank=0, world_size=1, first_step=0, last_step=plan.steps(PASSES + 1)
    )
    warm_up = plan.steps(1)  # the processes start
    frames, started = 0, 0.0
    for step, batch in batches:
        if step >= warm_up:
            frames += batch.frames.values.shape[0]
        elif step == warm_up - 1:
            started = time.perf_counter()
    return frames / (time.perf_counter() - started)


class _PngClips(Dataset[Tensor]):
    """One clip an item: float32 [T, 3, 224, 224]."""

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def __init__(self, folder: Path) -> None:
        self.folders = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, number: int) -> Tensor:
        top, left = np.random.randint(0, FRAME_SIZE - CROP_SIZE + 1, 2)
        frames = []
        for path in sorted(self.folders[number].iterdir()):
            picture = Image.open(path).convert("RGB").resize((FRAME_SIZE, FRAME_SIZE))
            picture = picture.crop((left, top, left + CROP_SIZE, top + CROP_SIZE))
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
            frames.append((pixels - self.mean) / self.std)
        return torch.stack(frames)


def _padded(clips: list[Tensor]) -> tuple[Tensor, list[int]]:
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), [len(clip) for clip in clips]


def _time_png(folder: Path, workers: int) -> float:
    loader = DataLoader(
        _PngClips(folder),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        collate_fn=_padded,
        multiprocessing_context="fork",
    )
    # The first batch of each worker waits for the start of the processes, so it is not counted.
    frames, started = 0, 0.0
    for step, (_, lengths) in enumerate(loader):
        if step >= workers:
            frames += sum(lengths)
        elif step == workers - 1:
            started = time.perf_counter()
    return frames / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
