"""Exact cutting of source videos: a span keeps the frames with start <= pts * time_base < end in Fraction arithmetic.

They are found by seeking to a keyframe before the span and decoding from there; stream copy returned wrong frames for
spans past the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from sltscale.data.clips import Clip, Cutting
from sltscale.data.encoding import PackedClip, SourceFrame, encode
from sltscale.data.video import MAX_FRAMES, MAX_SECONDS, VideoError, check_size, decoder_reason, video_stream

# Containers and protocols that corpora use; playlists and network protocols could reach beyond the file itself.
OPEN_OPTIONS = {"format_whitelist": "mov,matroska,webm,gif,avi", "protocol_whitelist": "file"}
# Codecs whose keyframe flags can be trusted for seeking. A gif marks frames that are only patches of the one before.
SEEKABLE = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}
# Containers index decoding order, which runs ahead of display order by at most the depth of B-frame reordering.
SEEK_MARGIN = Fraction(1)
# A whole file that stops this long before its header's duration has lost its tail.
MAX_LOST_SECONDS = Fraction(1, 2)


def pack_clip(clip: Clip, cutting: Cutting) -> PackedClip:
    """A clip of the corpus as it is stored.

    The bytes are a function of the arguments, the file and the versions of PyAV and x264 alone. VideoError with the
    reason if the clip cannot be used.
    """
    return encode(source_frames(clip.path, start=clip.start, end=clip.end, size=cutting.frame_size))


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
            stream = video_stream(container)
            check_size(stream.width, stream.height)
            yield from _cut(container, stream, start, end, size)
    except (av.FFmpegError, UnicodeError) as error:
        raise VideoError(decoder_reason(error)) from None


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


def _pts(frame: VideoFrame) -> int:
    pts = frame.pts if frame.pts is not None else frame.dts
    if pts is None:
        raise VideoError("frames without time stamps")
    return pts


def _upright_rgb(frame: VideoFrame, size: int | None) -> np.ndarray:
    check_size(frame.width, frame.height)
    if size is None:
        rgb = frame.to_ndarray(format="rgb24", threads=1)
    else:
        rgb = frame.to_ndarray(format="rgb24", threads=1, width=size, height=size, interpolation=Interpolation.AREA)
    # The metadata give the counter-clockwise turn that makes the frame upright.
    return np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90)) if frame.rotation else rgb
