"""Fast decoding of stored clips: one decoder for clip after clip, frames as the codec holds them.

Decoders run on one thread without frame threading, and colour conversion on one thread: PyAV's default of one
conversion thread per core costs three times the CPU time at 256 pixels.

Letters: T frames of a clip, H and W height and width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import cast

import av
import numpy as np
import numpy.typing as npt
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane

from sltscale.data.video.limits import MAX_PIXELS, VideoError, decoder_reason
from sltscale.data.video.samples import find_samples

BLACK, COLOURLESS = 16, 128  # of Y; of U and V: ITU-R BT.601, limited range
OPEN_DECODERS = 8  # kept by a process; clips of one corpus share one or two

_decoders: OrderedDict[tuple[str, bytes], VideoCodecContext] = OrderedDict()


def decode_yuv(data: bytes, keep: Sequence[int], out: npt.NDArray[np.uint8], top: int, left: int) -> None:
    """A window of chosen frames of a stored mp4, as the codec holds them: planar YUV 4:2:0, written into ``out``.

    keep: ascending frame numbers, at least one; decoding stops after the last. out: uint8 [T, 3 h / 2, w] for a window
    of h x w at (top, left), all even; per frame h rows of Y, then U and V at half the height and width, one behind the
    other. Leaving the conversion to RGB to the device spares half of the memory traffic and a fifth of the time here.
    VideoError if the bytes do not decode or hold fewer frames than asked for, or frames smaller than the window.
    """
    count, rows, width = out.shape
    height = rows * 2 // 3
    planes = _Planes(out.reshape(count, -1), height, width)
    for done, frame in enumerate(_chosen(data, keep, top + height, left + width)):
        planes.write(done, frame, top, left)


def decode_pixels(
    data: bytes, keep: Sequence[int], out: npt.NDArray[np.uint8], size: int, pixels: npt.NDArray[np.int64]
) -> None:
    """As ``decode_yuv``, but any pixels of the frames, which are size x size.

    out: uint8 [T, n], contiguous. pixels [n]: places in planar YUV 4:2:0 of size x size, behind which stand BLACK and
    COLOURLESS.
    """
    frame_bytes = size * size * 3 // 2
    source = np.empty(frame_bytes + 2, np.uint8)
    source[frame_bytes:] = BLACK, COLOURLESS
    planes = _Planes(source[None, :frame_bytes], size, size)
    for done, frame in enumerate(_chosen(data, keep, size, size)):
        planes.write(0, frame, 0, 0)
        np.take(source, pixels, out=out[done], mode="clip")  # the other modes go through a buffer


class _Planes:
    """uint8 [T, 3 h w / 2] that frames are written into.

    A row is one element: numpy then copies row by row in one loop, a quarter faster than a two-dimensional window.
    """

    def __init__(self, frames: npt.NDArray[np.uint8], height: int, width: int) -> None:
        luma = height * width
        self.height = height
        self.row, self.half_row = np.dtype((np.void, width)), np.dtype((np.void, width // 2))
        self.y = frames[:, :luma].view(self.row)
        self.u = frames[:, luma : luma * 5 // 4].view(self.half_row)
        self.v = frames[:, luma * 5 // 4 :].view(self.half_row)

    def write(self, number: int, frame: VideoFrame, top: int, left: int) -> None:
        y, u, v = frame.planes
        self.y[number, :] = _rows(y, self.row, self.height, top, left)
        self.u[number, :] = _rows(u, self.half_row, self.height // 2, top // 2, left // 2)
        self.v[number, :] = _rows(v, self.half_row, self.height // 2, top // 2, left // 2)


def _chosen(data: bytes, keep: Sequence[int], height: int, width: int) -> Iterator[VideoFrame]:
    """The frames ``keep`` as YUV 4:2:0; VideoError if there are fewer, or if they are smaller than height x width."""
    done = 0
    for number, frame in enumerate(_frames(data)):
        if frame.height < height or frame.width < width:
            raise VideoError(f"frames of {frame.width}x{frame.height} pixels; at least {width}x{height}")
        while keep[done] == number:
            if frame.format.name != "yuv420p":
                frame = frame.reformat(format="yuv420p", threads=1)
            yield frame
            done += 1
            if done == len(keep):
                return
    raise VideoError(f"holds fewer frames than expected: {done} of {len(keep)} could be decoded")


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


def _rows(plane: VideoPlane, row: np.dtype[np.void], count: int, top: int, left: int) -> npt.NDArray[np.void]:
    stride = plane.line_size
    return np.ndarray(count, row, cast(bytes, plane), top * stride + left, (stride,))


def _frames(data: bytes) -> Iterator[VideoFrame]:
    """In display order. Not for several threads at once: clips with the same description share a decoder."""
    try:
        samples = find_samples(data)
    except ValueError as error:
        raise VideoError(f"cannot be decoded: {error}") from None
    key = (samples.decoder, samples.extradata)
    decoder = _decoders.pop(key, None) or _new_decoder(*key)
    try:
        for offset, size in samples.places:
            yield from decoder.decode(av.Packet(data[offset : offset + size]))
        yield from decoder.decode(None)
    except av.FFmpegError as error:
        raise VideoError(decoder_reason(error)) from None
    finally:  # also when the caller has seen enough
        decoder.flush_buffers()
        _decoders[key] = decoder
        if len(_decoders) > OPEN_DECODERS:
            _decoders.popitem(last=False)


def _new_decoder(name: str, extradata: bytes) -> VideoCodecContext:
    decoder = cast(VideoCodecContext, av.CodecContext.create(name, "r"))
    decoder.extradata = extradata
    decoder.thread_type = "NONE"
    decoder.thread_count = 1
    decoder.options = {"max_pixels": str(MAX_PIXELS)}
    return decoder
