"""Which frames of a source belong to a clip: those of its span, and of these as many as the wanted rate allows.

Times are integers in the source's time base and stay so; all comparisons are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

from sltscale.data.video.limits import MAX_FRAMES, MAX_SECONDS, VideoError

# A whole file that stops this long before its header's duration has lost its tail.
MAX_LOST_SECONDS = Fraction(1, 2)
# Containers round times to their time base. At a rate near the source's own a frame must not be lost to that, nor may a
# coarse time base hide that the source is faster.
MAX_SLACK = Fraction(1, 32)

Picture = TypeVar("Picture")


@dataclass(frozen=True)
class Shown(Generic[Picture]):
    """A frame not yet converted, as few of them may be wanted; pts and duration count in the source's time base."""

    picture: Picture
    pts: int
    duration: int


def check_span(start: Fraction | None, end: Fraction | None) -> None:
    """VideoError for a span that no video can fill."""
    if start is not None and end is not None and end <= start:
        raise VideoError(f"span ends at {float(end):.3f} s, not after its start at {float(start):.3f} s")
    if end is not None and end - (start or 0) > MAX_SECONDS:
        raise VideoError(f"span of {float(end - (start or 0)):.3f} s is longer than {MAX_SECONDS} s")


def span(
    frames: Iterable[Shown[Picture]],
    time_base: Fraction,
    start: Fraction | None,
    end: Fraction | None,
    promised_end: Fraction | None = None,
) -> Iterator[Shown[Picture]]:
    """The frames with start <= time < end seconds.

    VideoError if there are none or too many, if times run backwards, if the span ends more than half a frame after the
    video does, and if a whole file breaks off before the end that its header promises, in seconds.
    """
    kept, gap = 0, 0
    pts: int | None = None
    first: Fraction | None = None
    for frame in frames:
        previous, pts = pts, frame.pts
        if previous is not None and pts < previous:
            raise VideoError("time stamps run backwards (avi with B-frames has none); convert it to mp4")
        gap = frame.duration or (pts - previous if previous is not None else 0) or gap
        time = pts * time_base
        if start is not None and time < start:
            continue
        if end is not None and time >= end:
            break
        first = time if first is None else first
        kept += 1
        if kept > MAX_FRAMES or time - first > MAX_SECONDS:
            raise too_long()
        yield Shown(frame.picture, pts, gap)
    else:
        _check_end(end, promised_end, ((pts or 0) + gap) * time_base, gap * time_base)
    if kept == 0:
        raise VideoError("no frames" if start is None else f"no frames from {float(start):.3f} s on")


def too_long() -> VideoError:
    return VideoError(f"longer than {MAX_SECONDS} s or {MAX_FRAMES} frames")


def _check_end(end: Fraction | None, promised: Fraction | None, video_end: Fraction, frame_seconds: Fraction) -> None:
    if end is not None and end > video_end + frame_seconds / 2:
        raise VideoError(f"span ends at {float(end):.3f} s, past the video's end at {float(video_end):.3f} s")
    if end is None and promised is not None and promised - video_end > MAX_LOST_SECONDS:
        raise VideoError(f"breaks off at {float(video_end):.3f} s of {float(promised):.3f} s")


def at_rate(frames: Iterable[Shown[Picture]], time_base: Fraction, fps: Fraction) -> Iterator[Shown[Picture]]:
    """The frames that are shown at the times k / fps after the first one, each once.

    So a faster source is thinned, and a frame that lasts 1 / fps or longer is always kept. Both are to be read with the
    exactness that times have: a tick of the time base, at most MAX_SLACK / fps.
    """
    step = 1 / (fps * time_base)
    slack = min(Fraction(1), MAX_SLACK * step)
    waiting: Shown[Picture] | None = None
    origin = 0
    for frame in frames:
        if waiting is None:
            origin = frame.pts
        elif _wanted(waiting.pts - origin, frame.pts - origin, step, slack):
            yield waiting
        waiting = frame
    if waiting is not None and _wanted(waiting.pts - origin, waiting.pts - origin + waiting.duration, step, slack):
        yield waiting


def _wanted(begin: int, end: int, step: Fraction, slack: Fraction) -> bool:
    """Whether [begin, end) ticks, as far as they are exact, holds a multiple of ``step`` or is as long."""
    due = math.ceil((begin - slack) / step) * step
    return due < end - slack or end - begin + slack >= step
