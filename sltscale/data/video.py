"""The only door to PyAV: exact cutting of source videos, encoding of stored clips, fast decoding of stored clips.

Times are exact: a span keeps the frames with start <= pts * time_base < end in Fraction arithmetic, found by seeking
to a keyframe before the span and decoding from there (stream copy returned wrong frames for spans past the end).
Decoders run on one thread without frame threading, and colour conversion on one thread: PyAV's default of one
conversion thread per core costs three times the CPU time at 256 pixels.

Letters: T frames of a clip, H and W height and width.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from sltscale.errors import InputError

MAX_SIDE = 4096
MAX_PIXELS = 9_000_000
MAX_SECONDS = 120
MAX_FRAMES = 7200
MAX_FPS = 1000

# Containers and protocols that corpora use; playlists and network protocols could reach beyond the file itself.
OPEN_OPTIONS = {"format_whitelist": "mov,matroska,webm,gif,avi", "protocol_whitelist": "file"}
# Codecs whose keyframe flags can be trusted for seeking. A gif marks frames that are only patches of the one before.
SEEKABLE = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}
# Containers index decoding order, which runs ahead of display order by at most the depth of B-frame reordering.
SEEK_MARGIN = Fraction(1)
# A whole file that stops this long before its header's duration has lost its tail.
MAX_LOST_SECONDS = Fraction(1, 2)
# libx264: short groups and fastdecode (no deblocking, no CABAC) double the speed of decoding for a third more bytes.
# With mbtree, x264's AVX-512 code gives other bytes in one run of ten; without, as many bytes and 0.5 dB less.
ENCODER = {"crf": "23", "g": "25", "tune": "fastdecode", "mbtree": "0", "threads": "1"}


class VideoError(InputError):
    """This clip cannot be used; the message is a reason in one line."""


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


def decode_clip(data: bytes, keep: Sequence[int] | None = None) -> np.ndarray:
    """Frames of a stored mp4 as RGB uint8 [T, 3, H, W], contiguous.

    keep: ascending frame numbers; only these are converted to RGB (and decoding stops after the last). None = all.
    VideoError if the bytes do not decode or hold fewer frames than asked for.
    """
    if keep is not None and len(keep) == 0:
        raise ValueError("keep must name at least one frame")
    try:
        with av.open(io.BytesIO(data), "r", format="mp4", metadata_errors="replace") as container:
            stream = _video_stream(container)
            wanted: Sequence[int] = range(stream.frames) if keep is None else keep
            _check_size(stream.width, stream.height)
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
        raise VideoError(_reason(error)) from None
    if done < len(wanted) or done == 0:
        raise VideoError(f"holds fewer frames than expected: {done} of {len(wanted)} could be decoded")
    return frames


def pack_clip(path: Path, start: Fraction | None, end: Fraction | None, frame_size: int) -> PackedClip:
    """The span [start, end) seconds of a source video (None = from its beginning, to its end) as a stored clip.

    Frames are squashed to ``frame_size`` x ``frame_size`` (even) pixels. The bytes are a function of the arguments,
    the file and the versions of PyAV and x264 alone. VideoError with the reason if the clip cannot be used.
    """
    return encode(source_frames(path, start=start, end=end, size=frame_size))


def source_frames(
    path: Path, *, start: Fraction | None = None, end: Fraction | None = None, size: int | None = None
) -> Iterator[SourceFrame]:
    """Frames of a source video with start <= time < end seconds, in display order.

    Rotation metadata is honoured. size: squash to size x size pixels while converting (area averaging).
    VideoError if the file cannot be read or is too large, if the span is empty, longer than MAX_SECONDS, or ends more
    than half a frame after the video does, and if a whole file breaks off before the duration in its header.
    """
    if start is not None and end is not None and end <= start:
        raise VideoError(f"span ends at {float(end):.3f} s, not after its start at {float(start):.3f} s")
    if end is not None and end - (start or 0) > MAX_SECONDS:
        raise VideoError(f"span of {float(end - (start or 0)):.3f} s is longer than {MAX_SECONDS} s")
    try:
        with av.open(f"file:{path}", "r", options=OPEN_OPTIONS, metadata_errors="replace") as container:
            stream = _video_stream(container)
            _check_size(stream.width, stream.height)
            yield from _cut(container, stream, start, end, size)
    except (av.FFmpegError, UnicodeError) as error:
        raise VideoError(_reason(error)) from None


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
        raise VideoError(f"cannot be encoded: {_reason(error)}") from None
    return PackedClip(
        buffer.getvalue(), count, _rate(count - 1, pts * time_base) if count > 1 else _rate(1, time_base * max(gap, 1))
    )


def _cut(
    container: InputContainer, stream: VideoStream, start: Fraction | None, end: Fraction | None, size: int | None
) -> Iterator[SourceFrame]:
    time_base = cast(Fraction, stream.time_base)
    kept, gap = 0, 0
    pts: int | None = None
    first: Fraction | None = None
    for frame in _display_order(container, stream, start):
        previous, pts = pts, _pts(frame)
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
            raise VideoError(f"longer than {MAX_SECONDS} s or {MAX_FRAMES} frames")
        yield SourceFrame(_upright_rgb(frame, size), pts, gap, time_base)
    else:
        _check_end(stream, end, ((pts or 0) + gap) * time_base, gap * time_base)
    if kept == 0:
        raise VideoError("no frames" if start is None else f"no frames from {float(start):.3f} s on")


def _check_end(stream: VideoStream, end: Fraction | None, video_end: Fraction, frame_seconds: Fraction) -> None:
    if end is not None and end > video_end + frame_seconds / 2:
        raise VideoError(f"span ends at {float(end):.3f} s, past the video's end at {float(video_end):.3f} s")
    if end is None and stream.duration and stream.time_base:
        promised = ((stream.start_time or 0) + stream.duration) * stream.time_base
        if promised - video_end > MAX_LOST_SECONDS:
            raise VideoError(f"breaks off at {float(video_end):.3f} s of {float(promised):.3f} s")


def _display_order(container: InputContainer, stream: VideoStream, start: Fraction | None) -> Iterator[VideoFrame]:
    """All frames from a keyframe at or before ``start`` on, or from the file's beginning."""
    if start is not None and start > SEEK_MARGIN and stream.codec_context.name in SEEKABLE:
        time_base = cast(Fraction, stream.time_base)
        container.seek(math.floor((start - SEEK_MARGIN) / time_base), stream=stream)
        frames = container.decode(stream)
        # Frames shown before the keyframe may refer to pictures before it (open groups): they are not to be used.
        key = next((frame for frame in frames if frame.key_frame), None)
        if key is not None and _pts(key) * time_base <= start:
            yield key
            yield from frames
            return
        container.seek(stream.start_time or 0, stream=stream)
    yield from container.decode(stream)


def _video_stream(container: InputContainer) -> VideoStream:
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


def _check_size(width: int, height: int) -> None:
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(f"frames of {width}x{height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all")


def _pts(frame: VideoFrame) -> int:
    pts = frame.pts if frame.pts is not None else frame.dts
    if pts is None:
        raise VideoError("frames without time stamps")
    return pts


def _rate(frames: int, seconds: Fraction) -> Fraction:
    """Frames per second as a fraction of 32-bit numbers."""
    rate = (Fraction(frames) / seconds).limit_denominator(1_000_000)
    if not 0 < rate <= MAX_FPS:
        raise VideoError(f"{float(rate):g} frames per second; at most {MAX_FPS}")
    return rate


def _copy_rgb(frame: VideoFrame, target: np.ndarray) -> None:
    """Convert into target [3, H, W]. The planar format is as fast as rgb24 and spares the transposition."""
    planes = frame.reformat(format="gbrp", threads=1).planes
    for channel, plane in zip((1, 2, 0), planes, strict=True):
        rows = np.frombuffer(cast(bytes, plane), np.uint8).reshape(plane.height, plane.line_size)
        target[channel] = rows[:, : plane.width]


def _upright_rgb(frame: VideoFrame, size: int | None) -> np.ndarray:
    _check_size(frame.width, frame.height)
    if size is None:
        rgb = frame.to_ndarray(format="rgb24", threads=1)
    else:
        rgb = frame.to_ndarray(format="rgb24", threads=1, width=size, height=size, interpolation=Interpolation.AREA)
    # The metadata give the counter-clockwise turn that makes the frame upright.
    return np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90)) if frame.rotation else rgb


def _reason(error: Exception) -> str:
    """FFmpeg's own words without its error number and the file name."""
    return f"cannot be decoded: {getattr(error, 'strerror', None) or error}"
