"""Bytes, pictures and colours of stored clips, for every preset."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from source_videos import draw, pack, stored_rgb, stored_times, write_video

from sltscale.data.clips import Cutting
from sltscale.data.video.encoding import SourceFrame, encode
from sltscale.data.video.limits import VideoError
from sltscale.data.video.presets import PRESETS
from sltscale.errors import InputError


def drawn(count: int, size: int) -> list[SourceFrame]:
    return [SourceFrame(draw(number, size, size), number, 1, Fraction(1, 25)) for number in range(count)]


def noisy(count: int, size: int) -> list[SourceFrame]:
    """With noise, as cameras have it; the encoders choose among more ways then."""
    noise = np.random.default_rng(0).integers(0, 40, (count, size, size, 3), np.uint8)
    return [
        replace(frame, rgb=np.maximum(frame.rgb, 40) - grain)
        for frame, grain in zip(drawn(count, size), noise, strict=True)
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_stored_pictures_are_the_same_kind_for_every_preset(preset: str) -> None:
    """The stream hands the planes over as they are: 8-bit 4:2:0, limited range, BT.601 or no word about it."""
    packed = encode(drawn(60, 128), preset)
    with av.open(io.BytesIO(packed.data), format="mp4") as container:
        frames = list(container.decode(video=0))
    assert packed.frames == len(frames) == 60 and packed.fps == 25
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(n, 25) for n in range(60)]
    assert {frame.format.name for frame in frames} == {"yuv420p"}
    assert {(frame.colorspace, frame.color_range) for frame in frames} <= {(2, 0), (5, 1), (6, 1)}
    luma = np.stack([frame.to_ndarray()[:128] for frame in frames])
    # White discs and the darkest blue of the drawing; full range would have 255 and 26.
    assert 225 <= np.percentile(luma, 99.5) <= 240 and 30 <= np.percentile(luma, 0.5) <= 45
    keys = [number for number, frame in enumerate(frames) if frame.key_frame]
    assert keys[0] == 0 and all(b - a <= 25 for a, b in zip(keys, [*keys[1:], 60], strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_stored_frames_are_close_to_the_source(preset: str) -> None:
    source = drawn(60, 128)
    found = stored_rgb(encode(source, preset).data).astype(float)
    expected = np.stack([frame.rgb for frame in source])
    error = ((found - expected) ** 2).mean(axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / error)).min() > 28
    assert np.abs((found - expected).mean(axis=(0, 1, 2))).max() < 2.5  # no shift of any colour


ENCODE = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_encoding import noisy
from sltscale.data.video.encoding import encode
print(hashlib.sha256(encode(noisy(40, int(sys.argv[3])), sys.argv[2]).data).hexdigest())
"""


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [64, 112])
def test_stored_bytes_are_the_same_every_time(preset: str, size: int) -> None:
    """At these sizes x264's mbtree gave two or three different files in ten."""
    size = max(size, PRESETS[preset].min_size)
    found = {hashlib.sha256(encode(noisy(40, size), preset).data).hexdigest() for _ in range(5)}
    paths = str(Path(__file__).parent)
    for _ in range(2):
        command = [sys.executable, "-c", ENCODE, paths, preset, str(size)]
        environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment)
        assert done.stderr == ""
        found.add(done.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_least_frame_size(preset: str) -> None:
    size = PRESETS[preset].min_size
    assert stored_rgb(encode(drawn(12, size), preset).data).shape == (12, size, size, 3)
    with pytest.raises(InputError, match=f"even number of pixels from {size} up"):
        Cutting(size - 2, preset=preset)


def test_variable_times_are_kept_by_every_preset(tmp_path: Path) -> None:
    times = [number * 40 + (number % 3) * 7 for number in range(30)]
    path = write_video(tmp_path / "v.mkv", 30, times=times, time_base=Fraction(1, 1000))
    for preset in PRESETS:
        assert stored_times(pack(path, None, None, 96, preset=preset).data) == [Fraction(t, 1000) for t in times]


COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 150, 120)])


def write_colours(path: Path, red: float, blue: float, colorspace: int, full: bool) -> Path:
    """Bands of COLOURS in YUV by the definition of the colour space: its weights of red and blue in luma."""
    green = 1 - red - blue
    matrix = np.array(
        [
            (red, green, blue),
            (-red / (2 - 2 * blue), -green / (2 - 2 * blue), 0.5),
            (0.5, -green / (2 - 2 * red), -blue / (2 - 2 * red)),
        ]
    )
    scale, offset = ((1, 1, 1), (0, 128, 128)) if full else ((219 / 255, 224 / 255, 224 / 255), (16, 128, 128))
    bands = np.clip(np.rint(COLOURS @ matrix.T * scale + offset), 0, 255).astype(np.uint8)
    luma, u, v = np.broadcast_to(bands.repeat(32, axis=0), (64, 32 * len(COLOURS), 3)).transpose(2, 0, 1)
    chroma = [plane[::2, ::2].reshape(-1, luma.shape[1]) for plane in (u, v)]
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(np.concatenate([luma, *chroma])), format="yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = luma.shape[1], 64, "yuv420p"
        stream.codec_context.colorspace = frame.colorspace = colorspace
        stream.codec_context.color_range = frame.color_range = 2 if full else 1
        for number in range(3):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


SOURCES = {
    "BT.601": (0.299, 0.114, 5, False),
    "BT.601, full range": (0.299, 0.114, 5, True),
    "BT.709": (0.2126, 0.0722, 1, False),
    "BT.709, full range": (0.2126, 0.0722, 1, True),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("preset", PRESETS)
def test_colours_come_through(tmp_path: Path, source: str, preset: str) -> None:
    path = write_colours(tmp_path / "v.mp4", *SOURCES[source])
    for how in ({}, {"crop": (0, 0, 1, 0.999)}):
        packed = pack(path, None, None, 192, preset=preset, **how)
        found = stored_rgb(packed.data)[1, 40:150, 16::32].mean(axis=0)
        assert np.abs(found - COLOURS).max() < 6, (how, found)


def test_presets_and_other_settings_are_checked_when_they_are_given() -> None:
    for settings, reason in [
        ({"preset": "h265"}, "unknown preset 'h265'; did you mean h264"),
        ({"preset": "webm"}, "expected one of h264, hevc, av1, jpeg"),
        ({"frame_size": 63}, "even number"),
        ({"frame_size": 3000}, "up to 2998"),
        ({"fps": Fraction(0)}, "0 frames per second"),
        ({"aspect": "stretch"}, "expected one of squash, keep"),
        ({"margin": -0.1}, "margin -0.1"),
        ({"margin": float("nan")}, "margin nan"),
        ({"crop": (0.5, 0, 0.5, 1)}, "left < right"),
        ({"crop": (0, 0, 1.1, 1)}, "from 0 to 1"),
    ]:
        with pytest.raises(InputError, match=reason):
            Cutting(**({"frame_size": 64} | settings))


def test_a_stored_clip_may_not_grow_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sltscale.data.video.encoding.MAX_CLIP_BYTES", 20_000)
    rng = np.random.default_rng(0)
    noise = (SourceFrame(rng.integers(0, 256, (64, 64, 3), np.uint8), n, 1, Fraction(1, 25)) for n in range(10_000))
    with pytest.raises(VideoError, match="more than 20000 bytes"):
        encode(noise, "jpeg")
    assert next(noise).pts < 20
