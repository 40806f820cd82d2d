from __future__ import annotations

import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
from openasl_corpus import pack, stamp, tool, write_annotations, write_corpus

from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards.forecast import BYTES_PER_CLIP, BYTES_PER_FRAME, Forecast, check_space, dry_run, forecast
from sltscale.data.shards.index import open_index
from sltscale.data.video.presets import PRESETS
from sltscale.errors import InputError

CUTTING = Cutting(256)


def clip(start: float | None = None, end: float | None = None, **facts: object) -> Clip:
    span = [None if time is None else Fraction(time) for time in (start, end)]
    return Clip("id", Path("v.mp4"), *span, "text", "en", "train", **facts)


def test_bytes_go_with_frames_and_area() -> None:
    ten_seconds = [clip(2, 12)]
    assert forecast(ten_seconds, CUTTING) == Forecast(1, 10.0, 0, 300 * 1518 + BYTES_PER_CLIP)
    assert forecast(ten_seconds, Cutting(128)).bytes == 75 * 1518 + BYTES_PER_CLIP
    assert forecast(ten_seconds, Cutting(256, fps=Fraction(10))).bytes == 100 * 1518 + BYTES_PER_CLIP
    assert forecast(ten_seconds, Cutting(256, fps=Fraction(50))).bytes == 300 * 1518 + BYTES_PER_CLIP
    assert forecast(ten_seconds, CUTTING, bytes_per_second=500).bytes == 5000
    assert BYTES_PER_FRAME.keys() == PRESETS.keys()


def test_images_are_counted(tmp_path: Path) -> None:
    named = clip(images=tuple(f"{n}.png" for n in range(50)), fps=Fraction(25))
    assert forecast([named], CUTTING) == Forecast(1, 2.0, 0, 50 * 1518 + BYTES_PER_CLIP)
    for number in range(75):
        (tmp_path / f"{number}.png").touch()
    listed = Clip("id", tmp_path, None, None, "text", "de", "train", fps=Fraction(25))
    assert forecast([listed], CUTTING).seconds == 3.0


def test_unknown_lengths_count_as_the_average() -> None:
    one = forecast([clip(0, 2)], CUTTING).bytes
    assert one is not None
    assert forecast([clip(0, 2), clip(), clip(1)], CUTTING) == Forecast(3, 2.0, 2, 3 * one)
    unknown = forecast([clip(), clip()], CUTTING)
    assert unknown.bytes is None and "2 clips of unknown length, bytes unknown" in str(unknown)
    assert forecast([], CUTTING) == Forecast(0, 0.0, 0, 0)


def test_space_is_checked_before_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = 1 << 60
    check_space(tmp_path, Forecast(5, 1.0, 0, 1))
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"about .* GB needed for 5 clips, .* GB free; make room"):
        check_space(tmp_path, Forecast(5, 1.0, 0, free))
    check_space(tmp_path, Forecast(5, 1.0, 5, None))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_packing_does_not_begin_on_a_disk_that_is_far_too_small(tmp_path: Path, corpus: Path) -> None:
    hours = [f"{n}\t-one\t00:00:00.000\t9999:00:00.000\tLong {n}.\t\t\ttrain" for n in range(1000)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_annotations(folder / "annotations.tsv", hours)
    (folder / "videos").symlink_to(corpus / "videos")
    with pytest.raises(InputError, match=r"GB needed for 1000 clips, .* free"):
        pack(folder, tmp_path / "out", cutting=Cutting(2998))
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_dry_run_lists_and_writes_nothing(tmp_path: Path, corpus: Path) -> None:
    done = subprocess.run(
        [*tool(corpus, tmp_path / "out"), "--dry-run"], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # Whether a span ends after the video does, only decoding tells: "late" (8 s) and "beyond" (1 s) count.
    hours = (18 * 0.8 + 8 + 1) / 3600
    assert lines[0].startswith(f"train: 22 clips, {hours:.2f} h and 2 clips of unknown length, about ")
    assert "  1 x video missing" in lines and "  1 x ends at _, not after its start at _" in lines
    assert any(line.startswith("dev: 3 clips, 0.00 h and 3 clips of unknown length, bytes unknown") for line in lines)
    assert "note: ids with slashes: 3" in lines
    assert list(tmp_path.iterdir()) == []


def test_dry_run_needs_no_videos(corpus: Path) -> None:
    (first, *_) = dry_run("openasl", [corpus / "annotations.tsv"], None, split="train", cutting=CUTTING)
    assert first.startswith("train: 23 clips")  # whether a video is missing cannot be said
    with pytest.raises(InputError, match="no clip of split 'test'; found train, dev"):
        dry_run("openasl", [corpus / "annotations.tsv"], None, split="test", cutting=CUTTING)


def test_tool_needs_videos_otherwise(tmp_path: Path, corpus: Path) -> None:
    command = tool(corpus, tmp_path / "out")
    at = command.index("--videos")
    done = subprocess.run([*command[:at], *command[at + 2 :]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "--videos and --out are needed" in done.stderr and done.stderr.count("\n") == 1


def test_forecast_is_near_what_packing_gives(tmp_path: Path, corpus: Path) -> None:
    """Within a factor of three: the drawn videos are simple, at this size headers weigh as much as pictures."""
    rows = [f"{n}\t-one\t{stamp(0)}\t{stamp(3)}\tText {n}.\t\t\ttrain" for n in range(4)]
    annotations = write_annotations(tmp_path / "annotations.tsv", rows)
    (tmp_path / "videos").symlink_to(corpus / "videos")
    (line, *_) = dry_run("openasl", [annotations], tmp_path / "videos", cutting=Cutting(64))
    pack(tmp_path, tmp_path / "out")
    actual = sum(open_index(tmp_path / "out", "train").shard_bytes) / 1e3
    assert actual / 3 < float(line.split("about ")[1].split(" kB")[0]) < 3 * actual
