"""Stored clips decoded without FFmpeg's demuxer, against FFmpeg's demuxer."""

import io
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from source_videos import draw

from sltscale.data.video.encoding import SourceFrame, encode
from sltscale.data.video.limits import VideoError
from sltscale.data.video.presets import PRESETS
from sltscale.data.video.samples import find_samples
from sltscale.data.video.stored import decode_clip, decode_yuv

SIZE = 96


def stored(frames: int = 40, preset: str = "h264", size: int = SIZE) -> bytes:
    """Irregular times, so that the encoder's B-frames come out of order and late."""
    pictures = [draw(number, size, size) for number in range(frames)]
    times = [number * 3 + number % 2 for number in range(frames)]
    source = [SourceFrame(picture, pts, 3, Fraction(1, 75)) for picture, pts in zip(pictures, times, strict=True)]
    return encode(source, preset).data


def demuxed(data: bytes) -> list[np.ndarray]:
    """uint8 [3 H / 2, W] of each frame."""
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]


def planes(data: bytes, keep: list[int], size: int = SIZE) -> np.ndarray:
    out = np.zeros((len(keep), size * 3 // 2, size), np.uint8)
    decode_yuv(data, keep, out, 0, 0)
    return out


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_frames_of_ffmpegs_demuxer(preset: str) -> None:
    clips = [stored(40, preset), stored(3, preset), stored(27, preset)]
    for data in clips:
        expected = demuxed(data)
        np.testing.assert_array_equal(planes(data, list(range(len(expected)))), np.stack(expected))
    # One decoder serves clip after clip, also after a caller that has seen enough in the middle of one.
    expected = demuxed(clips[0])
    np.testing.assert_array_equal(planes(clips[2], [1, 4])[1], demuxed(clips[2])[4])
    np.testing.assert_array_equal(planes(clips[0], [0, 13, 39]), np.stack([expected[k] for k in (0, 13, 39)]))


def test_clips_of_different_sizes_take_turns() -> None:
    small, large = stored(9, size=48), stored(9, size=SIZE)
    for _ in range(2):
        np.testing.assert_array_equal(planes(small, [8], 48)[0], demuxed(small)[8])
        np.testing.assert_array_equal(planes(large, [8])[0], demuxed(large)[8])


def test_the_samples_are_ffmpegs_packets() -> None:
    data = stored()
    with av.open(io.BytesIO(data), "r") as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    samples = find_samples(data)
    assert samples.decoder == "h264"
    assert [data[offset : offset + size] for offset, size in samples.places] == packets


def test_a_window_is_cut_out_of_every_plane() -> None:
    data = stored(5)
    out = np.zeros((2, 48, 32), np.uint8)
    decode_yuv(data, [1, 3], out, 10, 20)
    for found, number in zip(out, (1, 3), strict=True):
        frame = demuxed(data)[number]
        luma, chroma = frame[:SIZE], frame[SIZE:].reshape(2, SIZE // 2, SIZE // 2)
        expected = [luma[10:42, 20:52], *chroma[:, 5:21, 10:26]]
        np.testing.assert_array_equal(found.ravel(), np.concatenate([part.ravel() for part in expected]))


def test_what_cannot_be_given_is_refused() -> None:
    data = stored(5)
    with pytest.raises(VideoError, match="5 of 6 could be decoded"):
        planes(data, [0, 1, 2, 3, 4, 5])
    with pytest.raises(VideoError, match="at least 128x128"):
        planes(data, [0], 128)
    for broken in (b"", b"no mp4 at all", data[:200], data[: len(data) // 2], np.random.default_rng(0).bytes(5000)):
        with pytest.raises(VideoError, match="cannot be decoded"):
            planes(broken, [0])
        with pytest.raises(VideoError):
            decode_clip(broken)
    np.testing.assert_array_equal(planes(data, [4])[0], demuxed(data)[4])  # the decoder has not suffered


def test_a_sample_table_cannot_promise_more_than_the_file_holds() -> None:
    """With one size for all pictures, a table of 20 bytes may count four thousand millions of them."""
    data = stored(5)
    sizes, runs = data.index(b"stsz") + 8, data.index(b"stsc") + 8
    for at, values in ((sizes, (1, 2**32 - 1)), (sizes, (1, len(data) + 1)), (runs, (1, 0, 5)), (runs, (1, 2, 5))):
        broken = bytearray(data)
        struct.pack_into(f">{len(values)}I", broken, at, *values)
        with pytest.raises(ValueError, match=r"pictures in \d+ bytes|not in order"):
            find_samples(bytes(broken))


MUTATIONS = """
import sys
import numpy as np
from sltscale.data.video.limits import VideoError
from sltscale.data.video.stored import decode_yuv
original, rng, out = open(sys.argv[1], "rb").read(), np.random.default_rng(1), np.zeros((9, 72, 48), np.uint8)
refused = 0
for _ in range(400):
    data = bytearray(original)
    for place in rng.integers(0, len(data), rng.integers(1, 20)):
        data[place] = rng.integers(256)
    try:
        decode_yuv(bytes(data), range(9), out, 0, 0)
    except VideoError:
        refused += 1
print(refused)
"""


def test_mutated_clips_are_decoded_or_refused(tmp_path) -> None:
    """In a process of its own, which nothing may crash."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(stored(9, size=48))
    done = subprocess.run([sys.executable, "-c", MUTATIONS, path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert 20 < int(done.stdout) < 400
