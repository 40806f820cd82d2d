"""Small source videos for the tests of packing, drawn so that every frame differs from every other."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

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
    **options: str,
) -> Path:
    """h264 with B-frames and a single keyframe unless ``options`` of x264 say otherwise; ``times`` in ``time_base``."""
    settings = {"g": "1000", "bf": "3", "threads": "1", "preset": "veryfast"} | options
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream("libx264", rate=rate, options=settings)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        base = time_base or 1 / Fraction(rate)
        stream.codec_context.time_base = base
        for number in range(count):
            frame = VideoFrame.from_ndarray(draw(number, height, width), format="rgb24")
            frame.pts, frame.time_base = (times[number] if times else number), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def bare_decode(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    """(time, RGB [H, W, 3]) of every frame, decoded from the beginning to the end without any seeking."""
    with av.open(str(path)) as container:
        return [(f.pts * f.time_base, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
