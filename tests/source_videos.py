"""Small source videos for the tests of packing, drawn so that every frame differs from every other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from sltscale.data.clips import Clip, Cutting
from sltscale.data.video.cutting import pack_clip
from sltscale.data.video.encoding import PackedClip

REAL_VIDEOS = Path(__file__).parents[2] / "shared" / "videos"


def real_video(name: str) -> Path:
    path = REAL_VIDEOS / name
    if not path.is_file():
        pytest.skip(f"real footage {name} is not on this machine")
    return path


def draw(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [H, W, 3]: a disc that moves, brightness that grows, a red left and a blue right half."""
    rows, columns = np.mgrid[0:height, 0:width]
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : width // 2, 0] = 200
    frame[:, width // 2 :, 2] = 200
    frame[..., 1] = (number * 7) % 160
    frame[(rows - height // 2) ** 2 + (columns - number * 5 % width) ** 2 < (height // 6) ** 2] = 255
    return frame


def write_video(
    path: Path,
    count: int = 50,
    *,
    rate: Fraction | int = 25,
    height: int = 48,
    width: int = 64,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    muxer: dict[str, str] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    **options: str,
) -> Path:
    """h264 with B-frames and a single keyframe unless ``options`` of x264 say otherwise; ``times`` in ``time_base``."""
    settings = {"g": "1000", "bf": "3", "threads": "1", "preset": "veryfast"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=settings | options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        base = time_base or 1 / Fraction(rate)
        stream.codec_context.time_base = base
        for number in range(count):
            frame = VideoFrame.from_ndarray(draw(number, height, width), format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """A file with sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_black(
    path: Path, count: int = 23, height: int = 2160, width: int = 4096, muxer: dict[str, str] | None = None
) -> Path:
    """A few kB that decode to as many large frames as wanted."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        options = {"preset": "superfast", "crf": "51", "g": "1000", "threads": "1"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), format="yuv420p")
        for number in range(count):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def clip_of(path: Path, start: Fraction | str | None = None, end: Fraction | str | None = None, **facts: Any) -> Clip:
    """A clip of that source; times in seconds."""
    begin, stop = (None if time is None else Fraction(time) for time in (start, end))
    return Clip("id", path, begin, stop, **{"text": "", "language": "de", "split": "train"} | facts)


def pack(path: Path, start: Fraction | str | None, end: Fraction | str | None, size: int, **how: Any) -> PackedClip:
    return pack_clip(clip_of(path, start, end), Cutting(size, **how))


def stored_times(data: bytes) -> list[Fraction]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def stored_rgb(data: bytes) -> np.ndarray:
    """All frames as uint8 [T, H, W, 3], as PyAV decodes them without any help."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def bare_decode(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    """(time, RGB [H, W, 3]) of every frame, decoded from the beginning to the end without any seeking."""
    with av.open(str(path)) as container:
        return [(f.pts * f.time_base, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
