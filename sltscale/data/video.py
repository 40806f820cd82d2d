"""What every use of PyAV shares - limits, opening, one decoder thread - and fast decoding of stored clips.

Decoders run on one thread without frame threading, and colour conversion on one thread: PyAV's default of one
conversion thread per core costs three times the CPU time at 256 pixels. PyAV is imported here, in cutting.py and in
encoding.py only.

Letters: T frames of a clip, H and W height and width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from sltscale.errors import InputError

MAX_SIDE = 4096
MAX_PIXELS = 9_000_000
MAX_SECONDS = 120
MAX_FRAMES = 7200
MAX_FPS = 1000


class VideoError(InputError):
    """This clip cannot be used; the message is a reason in one line."""


def decode_clip(data: bytes, keep: Sequence[int] | None = None) -> np.ndarray:
    """Frames of a stored mp4 as RGB uint8 [T, 3, H, W], contiguous.

    keep: ascending frame numbers; only these are converted to RGB (and decoding stops after the last). None = all.
    VideoError if the bytes do not decode or hold fewer frames than asked for.
    """
    if keep is not None and len(keep) == 0:
        raise ValueError("keep must name at least one frame")
    try:
        with av.open(io.BytesIO(data), "r", format="mp4", metadata_errors="replace") as container:
            stream = video_stream(container)
            wanted: Sequence[int] = range(stream.frames) if keep is None else keep
            check_size(stream.width, stream.height)
            if len(wanted) > MAX_FRAMES:
                raise VideoError(f"{len(wanted)} frames; at most {MAX_FRAMES}")
            frames = np.empty((len(wanted), 3, stream.height, stream.width), np.uint8)
            done = 0
            for number, frame in enumerate(container.decode(stream)):
                while done < len(wanted) and wanted[done] == number:
                    _copy_rgb(frame, frames[done])
                    done += 1
                if done == len(wanted):
                    break
    except av.FFmpegError as error:
        raise VideoError(decoder_reason(error)) from None
    if done < len(wanted) or done == 0:
        raise VideoError(f"holds fewer frames than expected: {done} of {len(wanted)} could be decoded")
    return frames


def video_stream(container: InputContainer) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoError("no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError("its video codec is unknown")
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def check_size(width: int, height: int) -> None:
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(f"frames of {width}x{height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all")


def decoder_reason(error: Exception) -> str:
    """FFmpeg's own words without its error number and the file name."""
    return f"cannot be decoded: {getattr(error, 'strerror', None) or error}"


def _copy_rgb(frame: VideoFrame, target: np.ndarray) -> None:
    """Convert into target [3, H, W]. The planar format is as fast as rgb24 and spares the transposition."""
    planes = frame.reformat(format="gbrp", threads=1).planes
    for channel, plane in zip((1, 2, 0), planes, strict=True):
        rows = np.frombuffer(cast(bytes, plane), np.uint8).reshape(plane.height, plane.line_size)
        target[channel] = rows[:, : plane.width]
