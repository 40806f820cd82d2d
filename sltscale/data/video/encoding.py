"""Frames to the bytes of a stored clip: constant for the same frames, times kept exactly."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice

import av
import numpy as np
from av.container import OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream

from sltscale.data.clips import MAX_FPS
from sltscale.data.video.limits import MAX_CLIP_BYTES, VideoError, decoder_reason
from sltscale.data.video.presets import PRESETS, Preset

os.environ.setdefault("SVT_LOG", "1")  # or SVT-AV1 greets every clip


@dataclass(frozen=True)
class SourceFrame:
    """One frame of a source: rgb uint8 [H, W, 3], upright; pts and duration count in time_base seconds.

    size: width and height of the upright source (None = those of rgb).
    """

    rgb: np.ndarray
    pts: int
    duration: int
    time_base: Fraction
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class PackedClip:
    """A clip as stored in a shard: mp4 bytes, number of frames, average frames per second.

    width, height: of the upright source, before it was cropped and resized.
    """

    data: bytes
    frames: int
    fps: Fraction
    width: int
    height: int


def encode(frames: Iterable[SourceFrame], preset: str = "h264") -> PackedClip:
    """Frames of one even size as an mp4 that keeps their times, counted from the first frame.

    preset: a name of ``PRESETS``. Constant bytes for the same frames: one thread, nothing in the file depends on the
    time or the machine. VideoError if there is no frame, if they come too fast, or if the file grows too large.
    """
    source = iter(frames)
    head = list(islice(source, 2))
    if not head:
        raise VideoError("no frames")
    height, width = head[0].rgb.shape[:2]
    time_base = head[0].time_base
    gap = head[1].pts - head[0].pts if len(head) == 2 else head[0].duration
    buffer = io.BytesIO()
    count, pts = 0, -1
    try:
        with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            stream = _stream(container, PRESETS[preset], _rate(1, max(gap, 1) * time_base), width, height)
            stream.codec_context.time_base = time_base
            for frame in chain(head, source):
                # Some files repeat a time stamp; the encoder needs strictly rising ones.
                pts = max(frame.pts - head[0].pts, pts + 1)
                picture = VideoFrame.from_ndarray(frame.rgb, format="rgb24").reformat(format="yuv420p", threads=1)
                picture.pts, picture.time_base, picture.duration = pts, time_base, frame.duration
                container.mux(stream.encode(picture))
                count += 1
                if buffer.tell() > MAX_CLIP_BYTES:
                    raise VideoError(f"more than {MAX_CLIP_BYTES} bytes as stored; give smaller frames or fewer")
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise VideoError(f"cannot be encoded: {decoder_reason(error)}") from None
    fps = _rate(count - 1, pts * time_base) if count > 1 else _rate(1, time_base * max(gap, 1))
    return PackedClip(buffer.getvalue(), count, fps, *(head[0].size or (width, height)))


def _stream(container: OutputContainer, preset: Preset, rate: Fraction, width: int, height: int) -> VideoStream:
    stream = container.add_stream(preset.codec, rate=rate, options=preset.options)
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    if preset.flagged:
        stream.codec_context.colorspace = Colorspace.ITU601
        stream.codec_context.color_range = ColorRange.MPEG
    return stream


def _rate(frames: int, seconds: Fraction) -> Fraction:
    """Frames per second as a fraction of 32-bit numbers."""
    rate = (Fraction(frames) / seconds).limit_denominator(1_000_000)
    if not 0 < rate <= MAX_FPS:
        raise VideoError(f"{float(rate):g} frames per second; at most {MAX_FPS}")
    return rate
