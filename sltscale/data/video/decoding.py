"""What every use of PyAV shares - limits, opening, one decoder thread - and fast decoding of stored clips.

Decoders run on one thread without frame threading, and colour conversion on one thread: PyAV's default of one
conversion thread per core costs three times the CPU time at 256 pixels. PyAV is imported here, in cutting.py and in
encoding.py only.

Letters: T frames of a clip, H and W height and width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from sltscale.errors import InputError

MAX_SIDE = 4096
MAX_PIXELS = 9_000_000
MAX_SECONDS = 120
MAX_FRAMES = 7200
# A source may be long, as clips are spans of it; 100 hours are an error in its header.
MAX_SOURCE_SECONDS = 360_000
# As stored.
MAX_CLIP_BYTES = 256 * 2**20
# As RGB a video may be this many times its own bytes, once it is more than MAX_UNQUESTIONED_BYTES. Real signing
# measured 33 to 197 times (docs/cutting.md).
MAX_EXPANSION = 20_000
MAX_UNQUESTIONED_BYTES = 256 * 2**20


class VideoError(InputError):
    """This clip cannot be used; the message is a reason in one line."""


def decode_yuv(data: bytes, keep: Sequence[int], out: npt.NDArray[np.uint8], top: int, left: int) -> None:
    """A window of chosen frames of a stored mp4, as the codec holds them: planar YUV 4:2:0, written into ``out``.

    keep: ascending frame numbers, at least one; decoding stops after the last. out: uint8 [T, 3 h / 2, w] for a window
    of h x w at (top, left), all even; per frame h rows of Y, then U and V at half the height and width, one behind the
    other. Leaving the conversion to RGB to the device spares half of the memory traffic and a fifth of the time here.
    VideoError if the bytes do not decode or hold fewer frames than asked for, or frames smaller than the window.
    """
    count, rows, width = out.shape
    height = rows * 2 // 3
    planes = out.reshape(count, -1)
    luma = height * width
    windows = (
        planes[:, :luma].reshape(count, height, width),
        planes[:, luma : luma * 5 // 4].reshape(count, height // 2, width // 2),
        planes[:, luma * 5 // 4 :].reshape(count, height // 2, width // 2),
    )
    done = 0
    for number, frame in enumerate(_frames(data, top + height, left + width)):
        while done < count and keep[done] == number:
            if frame.format.name != "yuv420p":
                frame = frame.reformat(format="yuv420p", threads=1)
            for shift, plane, window in zip((0, 1, 1), frame.planes, windows, strict=True):
                stride = plane.line_size
                offset = (top >> shift) * stride + (left >> shift)
                target = window[done]
                target[:] = np.ndarray(target.shape, np.uint8, cast(bytes, plane), offset, (stride, 1))
            done += 1
        if done == count:
            return
    raise VideoError(f"holds fewer frames than expected: {done} of {count} could be decoded")


def decode_clip(data: bytes, keep: Sequence[int] | None = None) -> np.ndarray:
    """Frames of a stored mp4 as RGB uint8 [T, 3, H, W], for looking at.

    keep: ascending frame numbers, at least one; None = all. VideoError if the bytes do not decode or hold fewer frames
    than asked for.
    """
    if keep is not None and len(keep) == 0:
        raise ValueError("keep must name at least one frame")
    wanted = None if keep is None else set(keep)
    pictures = []
    for number, frame in enumerate(_frames(data)):
        if wanted is None or number in wanted:
            pictures.append(frame.to_ndarray(format="rgb24", threads=1))
        if keep is not None and number == keep[-1]:
            break
    if not pictures or (wanted is not None and len(pictures) < len(wanted)):
        raise VideoError(f"holds fewer frames than expected: {len(pictures)} of {len(keep or [0])} could be decoded")
    return np.stack(pictures).transpose(0, 3, 1, 2)


def _frames(data: bytes, min_height: int = 1, min_width: int = 1) -> Iterator[VideoFrame]:
    try:
        with av.open(io.BytesIO(data), "r", format="mp4", metadata_errors="replace") as container:
            stream = video_stream(container)
            check_size(stream.width, stream.height)
            if stream.height < min_height or stream.width < min_width:
                raise VideoError(f"frames of {stream.width}x{stream.height} pixels; at least {min_width}x{min_height}")
            yield from container.decode(stream)
    except av.FFmpegError as error:
        raise VideoError(decoder_reason(error)) from None


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
    if not width or not height:
        raise VideoError(f"frames of no known size, or above {MAX_PIXELS} pixels")
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(f"frames of {width}x{height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all")


def check_expansion(pixels: int, size: int) -> None:
    """Refuse what only a file made to exhaust the reader holds: pixels in all its frames out of size bytes."""
    if 3 * pixels > max(MAX_UNQUESTIONED_BYTES, MAX_EXPANSION * size):
        raise VideoError(f"{size} bytes would decode to {3 * pixels // 2**20} MiB; at most {MAX_EXPANSION}-fold")


def decoder_reason(error: Exception) -> str:
    """FFmpeg's own words without its error number and the file name."""
    return f"cannot be decoded: {getattr(error, 'strerror', None) or error}"
