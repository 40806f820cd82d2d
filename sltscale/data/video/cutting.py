"""Clips out of their sources, exactly: a span keeps the frames with start <= pts * time_base < end.

In videos they are found by seeking to a keyframe before the span and decoding from there; stream copy returned wrong
frames for spans past the end. Folders of images are read as videos of a constant rate.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from sltscale.data.clips import Clip, Cutting
from sltscale.data.video.encoding import PackedClip, SourceFrame, encode
from sltscale.data.video.framing import Framing, framing
from sltscale.data.video.images import image_names, read_image
from sltscale.data.video.limits import (
    MAX_PIXELS,
    MAX_SECONDS,
    MAX_SOURCE_SECONDS,
    VideoError,
    check_expansion,
    check_size,
    decoder_reason,
)
from sltscale.data.video.spans import Picture, Shown, at_rate, check_span, span, too_long

# Containers and protocols that corpora use; playlists and network protocols could reach beyond the file itself. The
# rest is for the decoders that look into the streams while the file is opened.
OPEN_OPTIONS = {
    "format_whitelist": "mov,matroska,webm,gif,avi",
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_PIXELS),
    "threads": "1",
}
# Codecs whose keyframe flags can be trusted for seeking. A gif marks frames that are only patches of the one before.
SEEKABLE = {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4"}
# Containers index decoding order, which runs ahead of display order by at most the depth of B-frame reordering.
SEEK_MARGIN = Fraction(1)
IMAGE_FPS = Fraction(25)

Beat = Callable[[], object]


def pack_clip(clip: Clip, cutting: Cutting, beat: Beat = lambda: None) -> PackedClip:
    """A clip of the corpus as it is stored.

    The bytes are a function of the arguments, the file and the versions of PyAV and its encoders alone. beat is called
    for every frame that comes out of the decoder. VideoError with the reason if the clip cannot be used.
    """
    packed = encode(_frames(clip, cutting, beat), cutting.preset)
    if packed.frames < 2:
        raise VideoError("a single frame is no signing")
    return packed


def source_frames(
    path: Path, *, start: Fraction | None = None, end: Fraction | None = None, size: int | None = None
) -> Iterator[SourceFrame]:
    """Frames of a video or folder of images with start <= time < end seconds, in display order.

    Rotation metadata is honoured. size: squash to size x size pixels while converting (area averaging).
    VideoError if it cannot be read or is too large, if the span is empty, longer than MAX_SECONDS, or ends more than
    half a frame after the video does, and if a whole file breaks off before the duration in its header.
    """
    clip = Clip("", path, start, end, text="", language="", split="")
    return _frames(clip, None if size is None else Cutting(size), lambda: None)


def _frames(clip: Clip, cutting: Cutting | None, beat: Beat) -> Iterator[SourceFrame]:
    """The frames of a clip as they are to be stored; without ``cutting`` all of them, as they are."""
    check_span(clip.start, clip.end)
    try:
        facts = clip.path.stat()
    except (OSError, ValueError) as error:
        raise VideoError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(facts.st_mode):
        yield from _image_frames(clip, cutting, beat)
    elif not stat.S_ISREG(facts.st_mode):
        raise VideoError("not a regular file")
    elif facts.st_size == 0:
        raise VideoError("an empty file")
    else:
        yield from _video_frames(clip, facts.st_size, cutting, beat)


def _image_frames(clip: Clip, cutting: Cutting | None, beat: Beat) -> Iterator[SourceFrame]:
    time_base = 1 / (clip.fps or IMAGE_FPS)
    shown = (Shown(name, number, 1) for number, name in enumerate(image_names(clip.path, clip.images)))
    first: tuple[int, int] | None = None
    for image in _chosen(shown, time_base, clip, cutting, None):
        rgb = read_image(clip.path / image.picture)
        beat()
        height, width = rgb.shape[:2]
        first = first or (width, height)
        if (width, height) != first:
            raise VideoError(f"image {image.picture} of {width}x{height} pixels, others of {first[0]}x{first[1]}")
        if cutting is not None:
            rgb = _framed(rgb, framing(width, height, clip.crop, cutting, Fraction(1)))
        yield SourceFrame(rgb, image.pts, image.duration, time_base, first)


def _video_frames(clip: Clip, file_bytes: int, cutting: Cutting | None, beat: Beat) -> Iterator[SourceFrame]:
    try:
        with av.open(f"file:{clip.path}", "r", options=OPEN_OPTIONS, metadata_errors="replace") as container:
            stream = _video_stream(container)
            time_base = cast(Fraction, stream.time_base)
            promised_end = _check_header(container, stream, clip, file_bytes)
            pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
            frames = _display_order(_Decoder(container, stream, beat), clip.start)
            shown = (Shown(frame, _pts(frame), frame.duration or 0) for frame in frames)
            for frame in _chosen(shown, time_base, clip, cutting, promised_end):
                rgb, size = _upright_rgb(frame.picture, clip, cutting, pixel_aspect)
                yield SourceFrame(rgb, frame.pts, frame.duration, time_base, size)
    except (av.FFmpegError, UnicodeError) as error:
        raise VideoError(decoder_reason(error)) from None


def _chosen(
    shown: Iterator[Shown[Picture]],
    time_base: Fraction,
    clip: Clip,
    cutting: Cutting | None,
    promised_end: Fraction | None,
) -> Iterator[Shown[Picture]]:
    frames = span(shown, time_base, clip.start, clip.end, promised_end)
    return frames if cutting is None or cutting.fps is None else at_rate(frames, time_base, cutting.fps)


def _check_header(container: InputContainer, stream: VideoStream, clip: Clip, file_bytes: int) -> Fraction | None:
    """The end of the stream in seconds, as its header has it (None = it does not say); refuses absurd promises."""
    check_size(stream.width, stream.height)
    time_base = cast(Fraction, stream.time_base)
    seconds = stream.duration * time_base if stream.duration else Fraction(container.duration or 0, av.time_base)
    if seconds > MAX_SOURCE_SECONDS:
        raise VideoError(f"a header that promises {float(seconds):.3g} s; at most {MAX_SOURCE_SECONDS} s")
    frames = stream.frames or math.floor(seconds * (stream.average_rate or 0))
    check_expansion(stream.width * stream.height * frames, file_bytes)
    if not stream.duration:
        return None
    begin = (stream.start_time or 0) * time_base
    if clip.end is None and begin + seconds - max(begin, clip.start or begin) > MAX_SECONDS:
        raise too_long()
    return begin + seconds


class _Decoder:
    """Frames of one stream, with an eye on what they cost: headers may lie, and bytes be few for what comes of them."""

    def __init__(self, container: InputContainer, stream: VideoStream, beat: Beat) -> None:
        self.stream = stream
        self.time_base = cast(Fraction, stream.time_base)
        self._container, self._beat = container, beat
        self._bytes = self._pixels = 0

    def seek(self, pts: int) -> None:
        self._container.seek(pts, stream=self.stream)

    def frames(self) -> Iterator[VideoFrame]:
        for packet in self._container.demux(self.stream):
            self._bytes += packet.size
            for frame in packet.decode():
                self._beat()
                self._pixels += frame.width * frame.height
                check_expansion(self._pixels, self._bytes)
                yield frame


def _display_order(decoder: _Decoder, start: Fraction | None) -> Iterator[VideoFrame]:
    """All frames from a keyframe at or before ``start`` on, or from the file's beginning."""
    if start is not None and start > SEEK_MARGIN and decoder.stream.codec.canonical_name in SEEKABLE:
        decoder.seek(math.floor((start - SEEK_MARGIN) / decoder.time_base))
        frames = decoder.frames()
        # Frames shown before the keyframe may refer to pictures before it (open groups): they are not to be used.
        key = next((frame for frame in frames if frame.key_frame), None)
        if key is not None and _pts(key) * decoder.time_base <= start:
            yield key
            yield from frames
            return
        decoder.seek(decoder.stream.start_time or 0)
    yield from decoder.frames()


def _pts(frame: VideoFrame) -> int:
    pts = frame.pts if frame.pts is not None else frame.dts
    if pts is None:
        raise VideoError("frames without time stamps")
    return pts


def _upright_rgb(
    frame: VideoFrame, clip: Clip, cutting: Cutting | None, pixel_aspect: Fraction
) -> tuple[np.ndarray, tuple[int, int]]:
    """RGB uint8 [H, W, 3] as it is to be stored, and width and height of the whole upright picture."""
    check_size(frame.width, frame.height)
    # The metadata give the counter-clockwise turn that makes the frame upright.
    turns = frame.rotation // 90
    size = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    if cutting is None:
        return _turned(frame.to_ndarray(format="rgb24", threads=1), turns), size
    to = framing(*size, clip.crop, cutting, 1 / pixel_aspect if turns % 2 else pixel_aspect)
    if to.box is not None:
        return _framed(_turned(frame.to_ndarray(format="rgb24", threads=1), turns), to), size
    width, height = (to.height, to.width) if turns % 2 else (to.width, to.height)
    return to.pad(_turned(_resized(frame, width, height), turns)), size


def _framed(rgb: np.ndarray, to: Framing) -> np.ndarray:
    if to.box is not None:
        left, top, right, bottom = to.box
        rgb = rgb[top:bottom, left:right]
    picture = VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    return to.pad(_resized(picture, to.width, to.height))


def _resized(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    return frame.to_ndarray(format="rgb24", threads=1, width=width, height=height, interpolation=Interpolation.AREA)


def _turned(rgb: np.ndarray, turns: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


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
