"""Packing goes on whatever happens to its workers, and its results do not depend on them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
from PIL import Image
from source_videos import clip_of, draw, pack, write_audio, write_black, write_video

from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards import packing as packing_module
from sltscale.data.shards.packing import packing
from sltscale.data.video.encoding import PackedClip


def results(clips: list[Clip], workers: int = 2, size: int = 32) -> list[PackedClip | str]:
    with packing(clips, Cutting(size), workers) as packed:
        return list(packed)


class Cruel(Clip):
    """Does something to the worker when it arrives there."""

    deed: tuple[Callable[..., Any], tuple[Any, ...]]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.deed


def cruel(action: Callable[..., Any], *arguments: Any) -> Clip:
    clip = Cruel("cruel", Path("none"), None, None, "", "de", "train")
    object.__setattr__(clip, "deed", (action, arguments))
    return clip


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("source") / "v.mp4", 50)


def spans(video: Path, count: int) -> list[Clip]:
    return [clip_of(video, Fraction(n % 30, 25), Fraction(n % 30 + 4 + n % 3, 25)) for n in range(count)]


def test_results_are_in_order_and_the_same_for_any_number_of_workers(video: Path) -> None:
    clips = spans(video, 40)
    clips[7] = clip_of(video.with_name("none.mp4"))
    one = results(clips, 1)
    assert one == results(clips, 3)
    assert one[7] == "cannot be read: No such file or directory"
    assert one[5] == pack(video, clips[5].start, clips[5].end, 32)
    assert [result.frames for n, result in enumerate(one) if n != 7] == [4 + n % 3 for n in range(40) if n != 7]
    assert results([], 2) == []
    assert results(clips[:1], 1) == one[:1]


def test_clips_that_kill_their_workers_are_rejected_alone(video: Path) -> None:
    clips = spans(video, 20)
    clips[3] = cruel(signal.raise_signal, signal.SIGSEGV)
    clips[4] = cruel(os._exit, 3)
    clips[19] = cruel(signal.raise_signal, signal.SIGKILL)
    found = results(clips, 3)
    assert {n: result for n, result in enumerate(found) if isinstance(result, str)} == {
        3: "the decoder crashed on it (signal 11)",
        4: "the decoder crashed on it (exit code 3)",
        19: "the decoder crashed on it (signal 9)",
    }
    expected = results(spans(video, 20), 1)
    assert all(found[n] == expected[n] for n in range(20) if n not in (3, 4, 19))


def test_a_single_worker_that_is_killed_is_replaced(video: Path) -> None:
    clips = [cruel(os.abort), *spans(video, 2)]
    found = results(clips, 1)
    assert found[0] == "the decoder crashed on it (signal 6)"
    assert found[1:] == results(clips[1:], 1)


def test_a_clip_that_makes_no_progress_is_rejected(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "CLIP_SECONDS", 5)
    clips = spans(video, 8)
    clips[2] = cruel(time.sleep, 1000)
    found = results(clips)
    assert found[2] == "takes longer than 5 s"
    assert all(isinstance(result, PackedClip) for n, result in enumerate(found) if n != 2)


def test_signs_of_life_keep_a_clip_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "CLIP_SECONDS", 3.0)
    path = write_video(tmp_path / "v.mp4", 400)
    begin = time.monotonic()
    with packing([clip_of(path)], Cutting(1200, preset="jpeg"), 1) as packed:
        result = next(packed)
    assert isinstance(result, PackedClip) and result.frames == 400
    if time.monotonic() - begin < 4:
        pytest.skip("this machine packs the clip in less than the limit")


def test_a_worker_killed_from_outside_costs_nothing(video: Path) -> None:
    clips = spans(video, 60)
    expected = results(clips, 1)
    found: list[PackedClip | str] = []
    before = workers()
    with packing(clips, Cutting(32), 2) as packed:
        for number, result in enumerate(packed):
            found.append(result)
            if number in (5, 25):
                running = sorted(workers() - before)
                os.kill(running[number % len(running)], signal.SIGKILL)
    assert found == expected


def test_memory_of_a_worker_is_limited(tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (3000, 3000)).save(folder / f"{number}.png", compress_level=1)
    clips = [*spans(video, 2), clip_of(folder), *spans(video, 2)]
    assert isinstance(results(clips, 1)[2], PackedClip)
    monkeypatch.setattr(packing_module, "WORKER_BYTES", 60 * 2**20)
    found = results(clips, 1)
    assert found[2] == "needs more memory than a worker may have"
    assert all(isinstance(result, PackedClip) for n, result in enumerate(found) if n != 2)


def workers() -> set[int]:
    """Processes that packing has started and that run; the test process may hold remains of other tests."""
    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one too
            if "spawn_main" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def test_leaving_early_ends_the_workers(video: Path) -> None:
    before = workers()
    begin = time.monotonic()
    with packing([*spans(video, 5), cruel(time.sleep, 1000), *spans(video, 100)], Cutting(32), 2) as packed:
        next(packed)
        assert workers() - before
    assert time.monotonic() - begin < 600  # not the thousand of the sleep
    assert not workers() - before


ORPHANS = """
import sys, time
from pathlib import Path
from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards.packing import packing

class Sleep(Clip):
    def __reduce__(self):
        return time.sleep, (1000,)

if __name__ == "__main__":
    facts = ("id", Path(sys.argv[1]), None, None, "", "de", "train")
    clips = [Clip(*facts), Sleep(*facts), *[Clip(*facts)] * 1000]
    with packing(clips, Cutting(32), 2) as packed:
        next(packed)
        print("ready", flush=True)
        for _ in packed:
            pass
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path, video: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    with subprocess.Popen([sys.executable, str(script), str(video)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        workers: list[psutil.Process] = []
        while len(workers) < 2:  # one of them asleep in the midst of its work
            time.sleep(0.5)
            workers = [child for child in psutil.Process(parent.pid).children() if "spawn_main" in str(child.cmdline())]
        parent.kill()
        parent.wait()
    assert psutil.wait_procs(workers, timeout=600)[1] == []


def test_workers_that_cannot_start_are_one_line(tmp_path: Path, video: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(ORPHANS.replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run([sys.executable, str(script), str(video)], capture_output=True, text=True, timeout=600)
    last = done.stderr.strip().splitlines()[-1]
    assert "InputError: a worker process ended while it started (exit code 1)" in last


def broken_sources(folder: Path) -> dict[str, Path]:
    """Ten sources that are no clips, and each is so in another way."""
    good = write_video(folder / "good.mp4", 30, g="10").read_bytes()
    files = {
        "truncated": good[: len(good) * 2 // 3],
        "empty": b"",
        "random": np.random.default_rng(0).bytes(3000),
        "wrong-header": b"RIFF" + good[4:],
    }
    paths = {name: folder / f"{name}.mp4" for name in files}
    for name, data in files.items():
        paths[name].write_bytes(data)
    paths["audio"] = write_audio(folder / "audio.mp4")
    paths["zero-frames"] = folder / "zero.mkv"
    with av.open(str(paths["zero-frames"]), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    paths["one-frame"] = write_video(folder / "one.mp4", 1)
    paths["absurd-size"] = folder / "wide.gif"
    Image.fromarray(draw(0)).save(paths["absurd-size"])
    data = bytearray(paths["absurd-size"].read_bytes())
    data[6:10] = (60000).to_bytes(2, "little") * 2
    paths["absurd-size"].write_bytes(data)
    paths["absurd-length"] = write_black(folder / "long.mp4", 3500, 16, 16)
    paths["missing"] = folder / "missing.mp4"
    return paths


def test_ten_kinds_of_broken_clips_are_named_and_all_others_packed(tmp_path: Path, video: Path) -> None:
    clips = spans(video, 190)
    broken = {}
    for number, (name, path) in enumerate(broken_sources(tmp_path).items()):
        broken[number * 19 + 5] = name
        clips.insert(number * 19 + 5, clip_of(path))
    found = results(clips)
    reasons = {broken[n]: result for n, result in enumerate(found) if isinstance(result, str)}
    assert reasons == {
        "truncated": "cannot be decoded: Invalid data found when processing input",
        "empty": "an empty file",
        "random": "cannot be decoded: Invalid data found when processing input",
        "wrong-header": "cannot be decoded: Invalid data found when processing input",
        "audio": "no video stream",
        "zero-frames": "cannot be decoded: End of file",
        "one-frame": "a single frame is no signing",
        "absurd-size": "frames of no known size, or above 9000000 pixels",
        "absurd-length": "longer than 120 s or 7200 frames",
        "missing": "cannot be read: No such file or directory",
    }
    assert sum(isinstance(result, PackedClip) for result in found) == 190


def mutated(good: bytes, seed: int) -> bytes:
    rng = random.Random(seed)  # noqa: S311
    data = bytearray(good)
    for _ in range(rng.choice((1, 1, 4, 30))):
        at = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", rng.randbytes(4)))
        elif kind == 2:
            del data[at : at + rng.randrange(1, 200)]
        elif kind == 3:
            other, length = rng.randrange(len(data)), rng.randrange(1, 300)
            data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
        elif rng.random() < 0.3:
            del data[at:]
        data = data or bytearray(b"\0")
    return bytes(data)


def test_mutated_files_neither_crash_nor_hang(tmp_path: Path) -> None:
    hevc = {"codec": "libx265", "height": 64, "x265-params": "log-level=none"}
    good = [
        write_video(tmp_path / "h264.mp4", 12, bf="2", g="6").read_bytes(),
        write_video(tmp_path / "hevc.mp4", 12, **hevc).read_bytes(),
    ]
    clips = []
    for seed in range(500):
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(mutated(good[seed % 4 == 3], seed))
        clips.append(clip_of(path))
    with packing(clips, Cutting(96), 2) as packed:
        found = list(packed)
    assert len(found) == 500
    reasons = [result for result in found if isinstance(result, str)]
    assert 100 < len(reasons) < 450  # neither are all of them broken, nor none
    assert not [reason for reason in reasons if "crashed" in reason or "takes longer" in reason or "\n" in reason]
