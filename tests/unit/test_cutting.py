from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from source_videos import bare_decode, real_video, write_video

from sltscale.data import cutting, encoding
from sltscale.data.clips import Clip, Cutting
from sltscale.data.cutting import source_frames
from sltscale.data.encoding import PackedClip
from sltscale.data.video import VideoError, decode_clip


def pack(path: Path, start: Fraction | None, end: Fraction | None, size: int) -> PackedClip:
    clip = Clip("id", path, start, end, text="", language="de", split="train")
    return cutting.pack_clip(clip, Cutting(size))


def assert_cut_equals_full_decode(path: Path, start: Fraction | None, end: Fraction | None) -> None:
    expected = [
        (time, rgb)
        for time, rgb in bare_decode(path)
        if (start is None or time >= start) and (end is None or time < end)
    ]
    found = list(source_frames(path, start=start, end=end))
    assert expected
    assert [frame.pts * frame.time_base for frame in found] == [time for time, _ in expected]
    for frame, (_, rgb) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(frame.rgb, rgb)


STRUCTURES = {
    "one keyframe": {},
    "short groups": {"g": "12"},
    "open groups": {"g": "12", "x264-params": "open-gop=1:scenecut=0"},
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("container", ["mp4", "mkv", "avi"])
def test_cuts_equal_a_full_decode(tmp_path: Path, structure: str, container: str) -> None:
    rate = Fraction(30000, 1001)
    options = {"bf": "0"} if container == "avi" else {}
    path = write_video(tmp_path / f"v.{container}", 120, rate=rate, **STRUCTURES[structure], **options)
    times = [time for time, _ in bare_decode(path)]
    for first, last in [(0, 10), (35, 36), (47, 61), (50, 75), (100, 119)]:
        assert_cut_equals_full_decode(path, times[first], times[last])
    assert_cut_equals_full_decode(path, Fraction("1.999"), Fraction("3.001"))
    assert_cut_equals_full_decode(path, times[110], None)
    assert_cut_equals_full_decode(path, None, None)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("margin", [0, -2])
def test_seeking_may_land_on_the_start_or_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, structure: str, margin: int
) -> None:
    """As it does in files with a poor index; here by aiming at the start itself, or two seconds behind it."""
    monkeypatch.setattr(cutting, "SEEK_MARGIN", Fraction(margin))
    path = write_video(tmp_path / "v.mp4", 120, **STRUCTURES[structure])
    for start in ("0.5", "0.96", "1.44", "2.2", "2.4", "3.9"):
        assert_cut_equals_full_decode(path, Fraction(start), Fraction(start) + Fraction("0.7"))


def test_avi_with_b_frames_is_refused(tmp_path: Path) -> None:
    """The container stores no display times; what the decoder makes up runs backwards."""
    with pytest.raises(VideoError, match="backwards"):
        pack(write_video(tmp_path / "v.avi", 60, bf="3"), None, None, 64)


def test_variable_rate_is_kept_in_the_stored_clip(tmp_path: Path) -> None:
    times = [number * 40 + (number % 3) * 7 for number in range(40)]
    path = write_video(tmp_path / "v.mkv", 40, times=times, time_base=Fraction(1, 1000))
    packed = pack(path, Fraction("0.2"), Fraction("1.2"), 64)
    kept = [time for time in times if 200 <= time < 1200]
    with av.open(io.BytesIO(packed.data)) as container:
        stored = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert stored == [Fraction(time - kept[0], 1000) for time in kept]
    assert packed.frames == len(kept)
    assert packed.fps == Fraction(len(kept) - 1) / Fraction(kept[-1] - kept[0], 1000)


def test_fps_is_the_sources_own(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 40, rate=Fraction(30000, 1001))
    assert pack(path, Fraction(1, 2), Fraction(1), 64).fps == Fraction(30000, 1001)


def rotate(path: Path, matrix: tuple[int, int, int, int]) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = matrix
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(("matrix", "clockwise"), [((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)])
def test_rotation_is_honoured(tmp_path: Path, matrix: tuple[int, int, int, int], clockwise: int) -> None:
    path = write_video(tmp_path / "v.mp4", 3)
    upright = [frame.rgb for frame in source_frames(path)]
    rotate(path, matrix)
    for before, frame in zip(upright, source_frames(path), strict=True):
        np.testing.assert_array_equal(frame.rgb, np.rot90(before, -clockwise))


def test_span_errors_name_the_reason(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 50)  # 2 s
    for start, end, reason in [
        ("1", "2.5", "ends at 2.500 s, past the video's end at 2.000 s"),
        ("3", "4", "past the video's end"),
        ("1", "1", "not after its start"),
        ("1", "0.5", "not after its start"),
        ("0", "500", "longer than 120 s"),
        ("1.001", "1.002", "no frames"),
    ]:
        with pytest.raises(VideoError, match=reason):
            pack(path, Fraction(start), Fraction(end), 64)
    with pytest.raises(VideoError, match="no frames from 2"):
        pack(path, Fraction(2), None, 64)
    # Annotations round to milliseconds: half a frame past the end is the end.
    assert pack(path, Fraction(1), Fraction("2.015"), 64).frames == 25


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_unusable_files_are_video_errors(tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mp4", 50).read_bytes()
    broken = {
        "empty": b"",
        "random": np.random.default_rng(0).bytes(5000),
        "truncated": good[: len(good) // 2],
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile good.mp4\n",
    }
    for name, data in broken.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(data)
        with pytest.raises(VideoError):
            pack(path, None, None, 64)
    write_audio(tmp_path / "audio.mp4")
    with pytest.raises(VideoError, match="no video stream"):
        pack(tmp_path / "audio.mp4", None, None, 64)
    with pytest.raises(VideoError, match="No such file"):
        pack(tmp_path / "missing.mp4", None, None, 64)


def test_whole_file_that_lost_its_tail(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 100, bf="0", muxer={"movflags": "faststart"})
    with av.open(str(path)) as container:
        cut = [packet.pos for packet in container.demux(video=0)][60]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(VideoError, match=r"breaks off at 2\.400 s of 4\.000 s"):
        pack(path, None, None, 64)
    assert pack(path, Fraction(0), Fraction(1), 64).frames == 25


def test_too_large_and_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = write_video(tmp_path / "wide.mp4", 1, width=4112, height=16)
    with pytest.raises(VideoError, match="4112x16 pixels"):
        pack(wide, None, None, 64)
    long = write_video(tmp_path / "long.mp4", 50)
    monkeypatch.setattr(cutting, "MAX_FRAMES", 49)
    with pytest.raises(VideoError, match="longer than"):
        pack(long, None, None, 64)


@pytest.mark.parametrize("size", [64, 112])
def test_stored_bytes_are_the_same_every_time(tmp_path: Path, size: int) -> None:
    """At these sizes x264's mbtree gave two or three different files in ten."""
    frames = list(source_frames(write_video(tmp_path / "v.mp4", 60), size=size))
    assert len({encoding.encode(frames).data for _ in range(10)}) == 1


def test_stored_clip_has_short_groups(tmp_path: Path) -> None:
    packed = pack(write_video(tmp_path / "v.mp4", 80), None, None, 64)
    with av.open(io.BytesIO(packed.data)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.codec_context.pix_fmt) == (64, 64, "yuv420p")
        keys = [number for number, frame in enumerate(container.decode(stream)) if frame.key_frame]
    assert keys[0] == 0 and all(b - a <= 25 for a, b in zip(keys, [*keys[1:], packed.frames], strict=True))


def test_decode_clip_gives_the_packed_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 60, height=128, width=128, crf="5")
    packed = pack(path, None, None, 128)
    frames = decode_clip(packed.data)
    assert frames.shape == (60, 3, 128, 128) and frames.dtype == np.uint8 and frames.flags.c_contiguous
    source = np.stack([frame.rgb for frame in source_frames(path)]).transpose(0, 3, 1, 2)
    error = np.abs(frames.astype(int) - source).mean(axis=(0, 2, 3))
    assert error.max() < 4  # a swapped channel would differ by 100
    with av.open(io.BytesIO(packed.data)) as container:
        bare = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    np.testing.assert_array_equal(frames, bare.transpose(0, 3, 1, 2))
    keep = [0, 1, 7, 30, 58]
    np.testing.assert_array_equal(decode_clip(packed.data, keep), frames[keep])


def test_decode_clip_refuses_what_it_cannot_give(tmp_path: Path) -> None:
    packed = pack(write_video(tmp_path / "v.mp4", 10), None, None, 64)
    with pytest.raises(VideoError, match="fewer frames"):
        decode_clip(packed.data, [0, 10])
    with pytest.raises(VideoError):
        decode_clip(packed.data[:200])
    with pytest.raises(ValueError, match="at least one"):
        decode_clip(packed.data, [])


@pytest.mark.parametrize(
    ("name", "frames"), [("slp_pose_test_video.mp4", 58), ("ssvp_slt_demo.gif", 181), ("openasl_teaser.gif", 74)]
)
def test_real_footage(name: str, frames: int) -> None:
    path = real_video(name)
    assert_cut_equals_full_decode(path, None, None)
    assert_cut_equals_full_decode(path, Fraction("0.3"), Fraction("1.1"))
    assert_cut_equals_full_decode(path, Fraction("1.101"), Fraction("1.9"))
    packed = pack(path, None, None, 128)
    assert packed.frames == len(decode_clip(packed.data)) == frames
