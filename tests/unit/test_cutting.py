from __future__ import annotations

import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from source_videos import (
    bare_decode,
    clip_of,
    draw,
    pack,
    real_video,
    stored_rgb,
    stored_times,
    write_audio,
    write_black,
    write_video,
)

from sltscale.data.clips import Cutting
from sltscale.data.video import cutting, spans
from sltscale.data.video.cutting import pack_clip, source_frames
from sltscale.data.video.limits import VideoError
from sltscale.data.video.stored import decode_clip


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


SOURCES = {
    "hevc with open groups": {"codec": "libx265", "x265-params": "keyint=15:open-gop=1:bframes=4:log-level=none"},
    "av1": {"codec": "libsvtav1", "g": "12", "preset": "10"},
    "vp9": {"codec": "libvpx-vp9", "g": "12", "deadline": "realtime", "cpu-used": "8"},
    "full range": {"pix_fmt": "yuvj420p"},
    "variable rate": {"times": [n * 40 + (n % 3) * 7 for n in range(90)], "time_base": Fraction(1, 1000)},
}


@pytest.mark.parametrize("source", SOURCES)
def test_cuts_of_other_sources_equal_a_full_decode(tmp_path: Path, source: str) -> None:
    path = write_video(tmp_path / "v.mkv", 90, height=64, **SOURCES[source])
    times = [time for time, _ in bare_decode(path)]
    for first, last in [(0, 10), (14, 16), (47, 61), (80, 89)]:
        assert_cut_equals_full_decode(path, times[first], times[last])
    assert_cut_equals_full_decode(path, times[70], None)
    assert_cut_equals_full_decode(path, None, None)


@pytest.mark.parametrize("source", [name for name in SOURCES if "codec" in SOURCES[name]])
def test_spans_are_found_by_seeking(tmp_path: Path, source: str) -> None:
    path = write_video(tmp_path / "v.mkv", 150, height=64, **SOURCES[source])
    beats: list[None] = []
    pack_clip(clip_of(path, "5.2", "5.6"), Cutting(64), lambda: beats.append(None))
    assert 10 <= len(beats) <= 70  # a second before, and the group of pictures


def test_avi_with_b_frames_is_refused(tmp_path: Path) -> None:
    """The container stores no display times; what the decoder makes up runs backwards."""
    with pytest.raises(VideoError, match="backwards"):
        pack(write_video(tmp_path / "v.avi", 60, bf="3"), None, None, 64)


def test_variable_rate_is_kept_in_the_stored_clip(tmp_path: Path) -> None:
    times = [number * 40 + (number % 3) * 7 for number in range(40)]
    path = write_video(tmp_path / "v.mkv", 40, times=times, time_base=Fraction(1, 1000))
    packed = pack(path, Fraction("0.2"), Fraction("1.2"), 64)
    kept = [time for time in times if 200 <= time < 1200]
    assert stored_times(packed.data) == [Fraction(time - kept[0], 1000) for time in kept]
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
    monkeypatch.setattr(spans, "MAX_FRAMES", 49)
    with pytest.raises(VideoError, match="longer than"):
        pack(long, None, None, 64)


def test_a_whole_file_that_is_too_long_is_not_decoded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 241, rate=2, g="10")
    beats: list[None] = []
    with pytest.raises(VideoError, match="longer than 120 s"):
        pack_clip(clip_of(path), Cutting(64), lambda: beats.append(None))
    assert beats == []
    assert pack(path, "0.5", None, 64).frames == 240


def test_decode_clip_gives_the_packed_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 60, height=128, width=128, crf="5")
    packed = pack(path, None, None, 128)
    frames = decode_clip(packed.data)
    assert frames.shape == (60, 3, 128, 128) and frames.dtype == np.uint8
    source = np.stack([frame.rgb for frame in source_frames(path)]).transpose(0, 3, 1, 2)
    error = np.abs(frames.astype(int) - source).mean(axis=(0, 2, 3))
    assert error.max() < 4  # a swapped channel would differ by 100
    np.testing.assert_array_equal(frames, stored_rgb(packed.data).transpose(0, 3, 1, 2))
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


def test_size_of_the_source_is_kept_with_the_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 5, width=80)
    packed = pack_clip(clip_of(path, crop=(8, 8, 16, 16)), Cutting(32))
    assert (packed.width, packed.height) == (80, 48)
    rotate(path, (0, 1, -1, 0))
    packed = pack(path, None, None, 32)
    assert (packed.width, packed.height) == (48, 80)


def test_target_rate_takes_the_frames_shown_at_its_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 60, rate=50)
    packed = pack(path, "0.1", "1.1", 64, fps=Fraction(30))
    # 50 fps frames shown at k / 30 s
    expected = [Fraction(int(k * Fraction(50, 30)), 50) for k in range(30)]
    assert stored_times(packed.data) == expected
    slower = write_video(tmp_path / "slower.mp4", 25)
    assert pack(slower, None, None, 64, fps=Fraction(30)).data == pack(slower, None, None, 64).data


def crossed(height: int, width: int, left: int, top: int) -> np.ndarray:
    """Grey with a green 16 x 16 square."""
    picture = np.full((height, width, 3), 90, np.uint8)
    picture[top : top + 16, left : left + 16] = (0, 200, 0)
    return picture


def write_images(folder: Path, pictures: list[np.ndarray], suffix: str = "png") -> Path:
    folder.mkdir()
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"images{number + 1}.{suffix}", quality=95)
    return folder


def green(rgb: np.ndarray) -> np.ndarray:
    return (rgb[..., 1].astype(int) - rgb[..., 0]) > 80


def test_crop_box_of_a_clip_and_of_the_corpus(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "c", [crossed(60, 100, 40, 20)] * 3)
    inside = green(stored_rgb(pack_clip(clip_of(folder, crop=(40, 20, 16, 16)), Cutting(32)).data))
    assert inside.mean() > 0.95
    grown = green(stored_rgb(pack_clip(clip_of(folder, crop=(40, 20, 16, 16)), Cutting(64, margin=0.5)).data))[0]
    assert grown[18:46, 18:46].all() and not grown[:14].any() and not grown[:, 50:].any()
    corpus = Cutting(32, crop=(0.4, 1 / 3, 0.56, 0.6))
    assert green(stored_rgb(pack(folder, None, None, 32, crop=corpus.crop).data)).mean() > 0.95
    # the clip's own box comes first
    assert green(stored_rgb(pack_clip(clip_of(folder, crop=(0, 0, 16, 16)), corpus).data)).mean() == 0


@pytest.mark.parametrize(("matrix", "corner"), [((0, 1, -1, 0), (0, 1)), ((-1, 0, 0, -1), (1, 1))])
def test_crop_box_counts_in_the_upright_picture(
    tmp_path: Path, matrix: tuple[int, ...], corner: tuple[int, int]
) -> None:
    """A white square in the upper left corner of the coded picture is in another one when upright."""
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[:16, :16] = 255
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    rotate(path, matrix)
    width, height = (64, 96) if matrix[0] == 0 else (96, 64)
    top, left = corner[0] * (height - 16), corner[1] * (width - 16)
    packed = pack_clip(clip_of(path, crop=(left, top, 16, 16)), Cutting(16))
    assert stored_rgb(packed.data).min() > 200
    other = pack_clip(clip_of(path, crop=(16, 16, 16, 16)), Cutting(16))
    assert stored_rgb(other.data).max() < 50


def test_kept_aspect_is_filled_with_black(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "c", [crossed(48, 96, 40, 16)] * 2)
    frame = stored_rgb(pack(folder, None, None, 64, aspect="keep").data)[0].astype(int)
    assert frame[:14].max() < 20 and frame[50:].max() < 20 and frame[18:46].min(axis=2).min() >= 0
    assert (abs(frame[17:47, :20] - 90) < 12).all()
    square = green(frame)
    assert abs(int(square.any(axis=0).sum()) - int(square.any(axis=1).sum())) <= 2


def test_kept_aspect_knows_oblong_pixels(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frame = stored_rgb(pack(path, None, None, 64, aspect="keep").data)[0]
    assert frame[20:44].min() > 180 and frame[:12].max() < 30 and frame[52:].max() < 30


def test_folders_of_images_are_clips(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "c", [draw(number) for number in range(12)])
    (folder / "notes.txt").write_text("no image")
    (folder / "._images1.png").write_text("left behind by another system")
    found = list(source_frames(folder))
    assert [frame.pts for frame in found] == list(range(12))
    for number, frame in enumerate(found):  # images10 after images9
        np.testing.assert_array_equal(frame.rgb, draw(number))
    packed = pack_clip(clip_of(folder, fps=Fraction(30)), Cutting(64))
    assert (packed.frames, packed.fps, packed.width, packed.height) == (12, 30, 64, 48)
    assert pack(folder, None, None, 64).fps == 25
    named = pack_clip(clip_of(folder, images=("images3.png", "images1.png")), Cutting(64))
    assert named.frames == 2
    np.testing.assert_allclose(
        stored_rgb(named.data)[:, 2:6, 2:6].mean(axis=(1, 2)),
        [draw(2)[2:6, 2:6].mean(axis=(0, 1)), draw(0)[2:6, 2:6].mean(axis=(0, 1))],
        atol=8,
    )
    assert stored_times(pack(folder, "0.08", "0.24", 64).data) == [Fraction(n, 25) for n in range(4)]
    with pytest.raises(VideoError, match=r"past the video's end at 0\.480 s"):
        pack(folder, "0.1", "0.9", 64)
    jpegs = write_images(tmp_path / "j", [draw(number) for number in range(2)], "JPG")
    assert pack(jpegs, None, None, 64).frames == 2


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    unequal = write_images(tmp_path / "unequal", [draw(0), draw(1, 50, 64)])
    linked = write_images(tmp_path / "linked", [draw(0)])
    (linked / "images2.png").symlink_to(unequal / "images1.png")
    broken = write_images(tmp_path / "broken", [draw(0)])
    (broken / "images2.png").write_bytes((broken / "images1.png").read_bytes()[:60])
    other = write_images(tmp_path / "other", [draw(0)])
    Image.fromarray(draw(1)).save(other / "images2.png", format="gif")
    for folder, reason in [
        (tmp_path / "none", "no PNG or JPEG images"),
        (unequal, "images2.png of 64x50 pixels, others of 64x48"),
        (linked, "images2.png is a link"),
        (broken, "images2.png cannot be decoded"),
        (other, "images2.png cannot be decoded: cannot identify"),
        (write_images(tmp_path / "one", [draw(0)]), "a single frame"),
    ]:
        with pytest.raises(VideoError, match=reason):
            pack(folder, None, None, 64)
    for name in ("../one/images1.png", "a/../images1.png", "/etc/passwd", "..", "a\\b.png"):
        with pytest.raises(VideoError, match="not the plain name"):
            pack_clip(clip_of(other, images=("images1.png", name)), Cutting(64))
    with pytest.raises(VideoError, match=r"images9\.png is missing"):
        pack_clip(clip_of(other, images=("images1.png", "images9.png")), Cutting(64))


def test_an_image_that_is_too_large_is_not_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for number in range(2):
        Image.new("1", (9000, 9000)).save(folder / f"{number}.png")
    with pytest.raises(VideoError, match="9000x9000 pixels"):
        pack(folder, None, None, 64)


def patch(path: Path, box: bytes, offset: int, format: str, *values: float) -> Path:
    """Overwrite part of the first box of that name, ``offset`` bytes after the name."""
    data = bytearray(path.read_bytes())
    struct.pack_into(format, data, data.index(box) + 4 + offset, *values)
    path.write_bytes(data)
    return path


def test_absurd_headers_are_refused(tmp_path: Path) -> None:
    fast = patch(write_video(tmp_path / "fast.mp4", 10), b"mdhd", 12, ">I", 1_000_000_000)
    long = patch(write_video(tmp_path / "long.mkv", 10), b"\x44\x89\x88", -1, ">d", 1e15)
    many = patch(write_video(tmp_path / "many.mp4", 10), b"stts", 8, ">I", 0x0CCCCCCC)
    wide = tmp_path / "wide.gif"
    first, second = (Image.fromarray(draw(number)) for number in range(2))
    first.save(wide, save_all=True, append_images=[second])
    patch(wide, b"GIF8", 2, "<HH", 60000, 60000)
    for path, reason in [
        (fast, r"1.95312e\+06 frames per second; at most 1000"),
        (long, r"promises 1e\+12 s"),
        (many, "would decode to 1887436 MiB"),
        (wide, "no known size, or above 9000000 pixels"),
    ]:
        with pytest.raises(VideoError, match=reason):
            pack(path, None, None, 64)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero")):
        with pytest.raises(VideoError, match="not a regular file"):
            pack(path, None, None, 64)


REFUSAL = """
import re, sys
from pathlib import Path
from sltscale.data.clips import Clip, Cutting
from sltscale.data.video.cutting import pack_clip
from sltscale.data.video.limits import VideoError

def resident(which):
    return int(re.search(which + r":\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])

clip, decoded = Clip("id", Path(sys.argv[1]), None, None, "", "de", "train"), []
before = resident("VmRSS")
try:
    pack_clip(clip, Cutting(256), lambda: decoded.append(1))
except VideoError as error:
    print(len(decoded), resident("VmHWM") - before, error)
"""


def test_a_small_file_of_many_large_frames_is_refused_from_its_header(tmp_path: Path) -> None:
    path = write_black(tmp_path / "bomb.mp4")
    assert path.stat().st_size < 10_000 and 23 * 4096 * 2160 * 3 > 600e6
    command = [sys.executable, "-c", REFUSAL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    decoded, kilobytes, message = done.stdout.split(maxsplit=2)
    assert "would decode to 582 MiB" in message
    assert int(decoded) == 0 and 0 < int(kilobytes) < 50_000


def test_what_the_header_does_not_tell_is_found_while_decoding(tmp_path: Path) -> None:
    """A stream as it is recorded live has neither a duration nor a number of frames in its header."""
    path = write_black(tmp_path / "bomb.mkv", 60, 1024, 2048, muxer={"live": "1"})
    with av.open(str(path)) as container:
        assert not container.duration and not container.streams.video[0].frames
    with pytest.raises(VideoError, match=r"would decode to 25\d MiB"):
        pack(path, None, None, 64)
