"""What packing a corpus will come to - clips, hours, bytes - from its annotations alone; nothing is decoded."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sltscale.data.annotations.reading import Corpus
from sltscale.data.clips import SPLITS, Clip, Cutting
from sltscale.data.corpora import read_corpus
from sltscale.data.shards.split_report import by_reason
from sltscale.errors import InputError
from sltscale.files import readable_bytes

# At 256 x 256 pixels, 313 frames of three pieces of real signing video.
BYTES_PER_FRAME = {"h264": 1518, "hevc": 799, "av1": 864, "jpeg": 7714}
# Tar headers and padding, the json member and the mp4's own tables.
BYTES_PER_CLIP = 5000
# Annotations give times, not frame rates; most sources have 25 or 30. Folders of images are packed at 25 (cutting.py).
VIDEO_FPS, IMAGE_FPS = 30.0, 25.0
# Forecasts are rough: up to this many times the free space, packing starts with a warning.
REFUSED_FROM = 2


@dataclass(frozen=True)
class Forecast:
    """seconds: of the clips whose length the annotations tell. unknown: how many do not; in ``bytes`` they count as
    long as the others are on average. bytes: None if no length is known."""

    clips: int
    seconds: float
    unknown: int
    bytes: int | None

    def __str__(self) -> str:
        size = "bytes unknown" if self.bytes is None else f"about {readable_bytes(self.bytes)}"
        unknown = f" and {self.unknown} clips of unknown length" if self.unknown else ""
        return f"{self.clips} clips, {self.seconds / 3600:.2f} h{unknown}, {size}"


def forecast(clips: Iterable[Clip], cutting: Cutting, bytes_per_second: float | None = None) -> Forecast:
    """bytes_per_second: of what has been packed of these clips so far, if anything; else the presets' table counts."""
    count, unknown, seconds, frames = 0, 0, 0.0, 0.0
    for clip in clips:
        count += 1
        length = _seconds(clip)
        if length is None:
            unknown += 1
            continue
        fps = _fps(clip)
        seconds += length
        frames += length * (min(fps, float(cutting.fps)) if cutting.fps else fps)
    if unknown == count:
        return Forecast(count, 0.0, unknown, 0 if count == 0 else None)
    if bytes_per_second is None:
        area = (cutting.frame_size / 256) ** 2
        size = frames * BYTES_PER_FRAME[cutting.preset] * area + (count - unknown) * BYTES_PER_CLIP
    else:
        size = seconds * bytes_per_second
    return Forecast(count, seconds, unknown, math.ceil(size * count / (count - unknown)))


def dry_run(
    corpus: str,
    annotations: Sequence[Path],
    videos: Path | None,
    *,
    captions: Path | None = None,
    split: str | None = None,
    language: str | None = None,
    cutting: Cutting,
) -> list[str]:
    """What ``make_shards`` would find, as lines: clips, hours and bytes of each split, rejected rows, notes.

    Decodes and writes nothing. Without ``videos`` it does not look for them either.
    """
    read = read_corpus(corpus, annotations, videos, language=language, split=split, captions=captions)
    lines = []
    for name in chosen_splits(read, split, annotations):
        rejected = [row for row in read.rejected if row.split == name]
        clips = [clip for clip in read.clips if clip.split == name]
        lines.append(f"{name}: {forecast(clips, cutting)}; {len(rejected)} rejected")
        lines += [f"  {count} x {reason}" for reason, count in by_reason(rejected).most_common()]
    without = [row for row in read.rejected if not row.split]
    if without:
        lines.append(f"without a split: {len(without)} rejected")
        lines += [f"  {count} x {reason}" for reason, count in by_reason(without).most_common()]
    lines += [f"note: {note}: {count}" for note, count in read.notes.items()]
    return lines


def chosen_splits(read: Corpus, split: str | None, annotations: Sequence[Path]) -> list[str]:
    """The splits of a corpus that are to be packed; InputError if it does not have the one that was asked for."""
    found = {clip.split for clip in read.clips} | {row.split for row in read.rejected}
    present = [name for name in SPLITS if name in found]
    if split is None:
        return present
    if split not in present:
        row = next(iter(read.rejected), None)
        first = f"; {len(read.rejected)} rows rejected, the first: {row.reason}" if row else ""
        names = ", ".join(map(str, annotations))
        raise InputError(f"{names}: no clip of split {split!r}; found {', '.join(present) or 'none'}{first}")
    return [split]


def check_space(out: Path, expected: Forecast) -> None:
    """InputError if far more is expected than is free where ``out`` lies; a line on stderr if somewhat more is."""
    free = shutil.disk_usage(out).free
    if expected.bytes is None or expected.bytes <= free:
        return
    needed = f"about {readable_bytes(expected.bytes)} needed for {expected.clips} clips"
    message = f"{out}: {needed}, {readable_bytes(free)} free"
    if expected.bytes > REFUSED_FROM * free:
        raise InputError(f"{message}; make room, give another --out, a smaller --frame-size or --fps")
    print(f"warning: {message}; going on, for the forecast is rough", file=sys.stderr, flush=True)


def _seconds(clip: Clip) -> float | None:
    if clip.start is not None and clip.end is not None:
        return float(clip.end - clip.start)
    names = len(clip.images)
    if not names and _is_folder(clip):
        names = sum(1 for _ in os.scandir(clip.path))
    return names / float(clip.fps or IMAGE_FPS) if names else None


def _fps(clip: Clip) -> float:
    return float(clip.fps or (IMAGE_FPS if clip.images or _is_folder(clip) else VIDEO_FPS))


def _is_folder(clip: Clip) -> bool:
    return not clip.path.suffix and clip.path.is_dir()
