from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from sltscale.data.corpora import openasl, read_corpus
from sltscale.errors import InputError

HEADER = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit"
REAL = Path(__file__).parents[3] / "shared" / "annotations" / "openasl" / "openasl-v1.0.reconstructed_dev_test.tsv"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("-a.b.mp4", "b.webm", "c.gif", "c.mp4", "notes.txt"):
        (folder / name).touch()
    return folder


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in (header, *rows)).encode())
    return path


def row(vid: str, yid: str = "b", start: str = "00:00:01.000", end: str = "00:00:02.500", text: str = "Hi.") -> str:
    return f"{vid}\t{yid}\t{start}\t{end}\t{text}\t\t\ttrain"


def test_rows_become_clips(tmp_path: Path, videos: Path) -> None:
    annotations = write(
        tmp_path / "a.tsv",
        "-a.b-00:00:14.100\t-a.b\t01:02:14.100\t01:02:17.266\tHi “you”\u2028there.\thi\tHI\ttrain",
        'q\tc\t\t\t"He said ""no"" twice."\t\t\tvalid',
        'r\tb\t00:00:00.000\t00:00:00.033\t"Stray" mark\t\t\ttest\r',
    )
    clips, rejected = openasl(annotations, videos)
    assert rejected == []
    first, second, third = clips
    assert (first.id, first.path, first.line) == ("-a.b-00:00:14.100", videos / "-a.b.mp4", 2)
    assert (first.start, first.end) == (Fraction("3734.1"), Fraction("3737.266"))
    assert (first.text, first.language, first.split) == ("Hi “you”\u2028there.", "en", "train")
    assert (second.start, second.end, second.split, second.text) == (None, None, "dev", 'He said "no" twice.')
    assert second.path == videos / "c.mp4"
    assert (third.end, third.text, third.split) == (Fraction(33, 1000), '"Stray" mark', "test")


def test_bad_rows_are_rejected_with_line_and_reason(tmp_path: Path, videos: Path) -> None:
    annotations = write(
        tmp_path / "a.tsv",
        row("good"),
        row("reversed", start="00:00:03.000"),
        row("same", start="00:00:02.500"),
        row("time", end="2.5 s"),
        row("minute", end="00:61:00.000"),
        row("half", end=""),
        "short\tb\t00:00:01.000",
        row("long") + "\textra",
        row("good"),
        row("blank", text="  "),
        row("split").replace("train", "valdi"),
        row("gone", yid="zzz"),
        row("escape", yid="../videos/b"),
        row(""),
        "",
    )
    clips, rejected = openasl(annotations, videos)
    assert [clip.id for clip in clips] == ["good"]
    assert [(r.id, r.line, r.split) for r in rejected] == [
        ("reversed", 3, "train"),
        ("same", 4, "train"),
        ("time", 5, "train"),
        ("minute", 6, "train"),
        ("half", 7, "train"),
        ("short", 8, ""),
        ("long", 9, "train"),
        ("good", 10, "train"),
        ("blank", 11, "train"),
        ("split", 12, ""),
        ("gone", 13, "train"),
        ("escape", 14, "train"),
        ("", 15, "train"),
    ]
    for found, expected in zip(
        rejected,
        [
            "ends at 00:00:02.500, not after its start at 00:00:03.000",
            "not after",
            "unreadable time '2.5 s'",
            "unreadable time",
            "unreadable time ''",
            "3 fields instead of 8",
            "9 fields",
            "already used in line 2",
            "empty text",
            "unknown split 'valdi'",
            "video missing",
            "video missing",
            "empty id",
        ],
        strict=True,
    ):
        assert expected in found.reason


def test_unusable_files_are_one_clear_line(tmp_path: Path, videos: Path) -> None:
    cases = {
        "empty": (b"", "is empty"),
        "blank": (b"\n\n", "is empty"),
        "header": (HEADER.encode() + b"\n", "no rows"),
        "commas": (HEADER.replace("\t", ",").encode() + b"\nx\n", "separated by ','"),
        "bars": (HEADER.replace("\t", "|").encode() + b"\nx\n", "separated by '|'"),
        "column": (HEADER.replace("raw-text", "raw_text").encode() + b"\nx\n", "'raw-text' is missing.*'raw_text'"),
        "latin": (
            HEADER.encode() + b"\n" + row("x", text="Gr\u00fc\u00df").encode("latin-1") + b"\n",
            "line 2: not UTF-8",
        ),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.tsv"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            openasl(path, videos)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        openasl(tmp_path / "missing.tsv", videos)
    with pytest.raises(InputError, match="video folder"):
        openasl(write(tmp_path / "a.tsv", row("x")), tmp_path / "nowhere")


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, videos: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n{row('x')}\r\n".encode())
    assert [clip.id for clip in openasl(path, videos)[0]] == ["x"]


def test_unknown_corpus_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean openasl"):
        read_corpus("open_asl", tmp_path, tmp_path)


def test_real_openasl_rows(tmp_path: Path) -> None:
    if not REAL.is_file():
        pytest.skip("the real OpenASL annotation is not on this machine")
    videos = tmp_path / "videos"
    videos.mkdir()
    for line in REAL.read_text(encoding="utf-8").split("\n")[1:]:
        if line:
            (videos / f"{line.split(chr(9))[1]}.mp4").touch()
    clips, rejected = openasl(REAL, videos)
    assert rejected == []
    assert [sum(clip.split == split for clip in clips) for split in ("dev", "test")] == [967, 976]
    assert not any(clip.text.startswith('"') and clip.text.endswith('"') and '""' in clip.text for clip in clips)
