"""Frames to the bytes of a stored clip: constant for the same frames, times kept exactly."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice

import av
import numpy as np
from av.video.frame import VideoFrame

from sltscale.data.video import MAX_FPS, VideoError, decoder_reason

# libx264: short groups and fastdecode (no deblocking, no CABAC) double the speed of decoding for a third more bytes.
# With mbtree, x264's AVX-512 code gives other bytes in one run of ten; without, as many bytes and 0.5 dB less.
ENCODER = {"crf": "23", "g": "25", "tune": "fastdecode", "mbtree": "0", "threads": "1"}


@dataclass(frozen=True)
class SourceFrame:
    """One frame of a source video: rgb uint8 [H, W, 3], upright; pts and duration count in time_base seconds."""

    rgb: np.ndarray
    pts: int
    duration: int
    time_base: Fraction


@dataclass(frozen=True)
class PackedClip:
    """A clip as stored in a shard: mp4 bytes, number of frames, average frames per second."""

    data: bytes
    frames: int
    fps: Fraction


def encode(frames: Iterable[SourceFrame]) -> PackedClip:
    """Frames of one even size as h264 mp4 that keeps their times, counted from the first frame.

    Constant bytes for the same frames: one thread, nothing in the file depends on the time or the machine.
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
            stream = container.add_stream("libx264", rate=_rate(1, max(gap, 1) * time_base), options=ENCODER)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = time_base
            for frame in chain(head, source):
                # Some files repeat a time stamp; the encoder needs strictly rising ones.
                pts = max(frame.pts - head[0].pts, pts + 1)
                picture = VideoFrame.from_ndarray(frame.rgb, format="rgb24").reformat(format="yuv420p", threads=1)
                picture.pts, picture.time_base, picture.duration = pts, time_base, frame.duration
                container.mux(stream.encode(picture))
                count += 1
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise VideoError(f"cannot be encoded: {decoder_reason(error)}") from None
    return PackedClip(
        buffer.getvalue(), count, _rate(count - 1, pts * time_base) if count > 1 else _rate(1, time_base * max(gap, 1))
    )


def _rate(frames: int, seconds: Fraction) -> Fraction:
    """Frames per second as a fraction of 32-bit numbers."""
    rate = (Fraction(frames) / seconds).limit_denominator(1_000_000)
    if not 0 < rate <= MAX_FPS:
        raise VideoError(f"{float(rate):g} frames per second; at most {MAX_FPS}")
    return rate
