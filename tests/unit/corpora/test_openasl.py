from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from annotation_files import OPENASL, openasl_row, real, reasons, write

from sltscale.data.corpora import read_corpus


def test_openasl_rows_become_clips(tmp_path: Path, videos: Path) -> None:
    annotations = write(
        tmp_path / "a.tsv",
        OPENASL,
        "-a.b-00:00:14.100\t-a.b\t01:02:14.100\t01:02:17.266\tHi “you”\u2028there.\thi\tHI\ttrain",
        'q\tc\t\t\t"He said ""no"" twice."\t\t\tvalid',
        'r\tb\t00:00:00.000\t00:00:00.033\t"Stray" mark\t\t\ttest\r',
    )
    corpus = read_corpus("openasl", [annotations], videos)
    assert corpus.rejected == []
    first, second, third = corpus.clips
    assert (first.id, first.path, first.line) == ("-a.b-00:00:14.100", videos / "-a.b.mp4", 2)
    assert (first.start, first.end) == (Fraction("3734.1"), Fraction("3737.266"))
    assert (first.text, first.language, first.split) == ("Hi “you”\u2028there.", "en", "train")
    assert (second.start, second.end, second.split, second.text) == (None, None, "dev", 'He said "no" twice.')
    assert second.path == videos / "c.mp4"
    assert (third.end, third.text, third.split) == (Fraction(33, 1000), '"Stray" mark', "test")
    for note in ("ids that begin with -", "ids with dots", "ids with colons"):
        assert corpus.notes[note] == 1


def test_bad_rows_are_rejected_with_file_line_and_reason(tmp_path: Path, videos: Path) -> None:
    annotations = write(
        tmp_path / "a.tsv",
        OPENASL,
        openasl_row("good"),
        openasl_row("reversed", start="00:00:03.000"),
        openasl_row("same", start="00:00:02.500"),
        openasl_row("unit", end="2.5 s"),
        openasl_row("nan", start="nan"),
        openasl_row("inf", end="inf"),
        openasl_row("exponent", end="1e3"),
        openasl_row("minus", start="-1"),
        openasl_row("digits", end="\u0663"),
        openasl_row("minute", end="00:61:00.000"),
        openasl_row("half", end=""),
        "short\tb\t00:00:01.000",
        openasl_row("long") + "\textra",
        openasl_row("good"),
        openasl_row("blank", text="  "),
        openasl_row("split").replace("train", "valdi"),
        openasl_row("gone", yid="zzz"),
        openasl_row("escape", yid="../videos/b"),
        openasl_row(""),
        "\t" * 7,
        "",
        openasl_row("last"),
    )
    corpus = read_corpus("openasl", [annotations], videos)
    assert [clip.id for clip in corpus.clips] == ["good", "last"]
    assert reasons(corpus.rejected) == [
        ("reversed", 3, "ends at 00:00:02.500, not after its start at 00:00:03.000"),
        ("same", 4, "ends at 00:00:02.500, not after its start at 00:00:02.500"),
        ("unit", 5, "unreadable time '2.5 s'"),
        ("nan", 6, "unreadable time 'nan'"),
        ("inf", 7, "unreadable time 'inf'"),
        ("exponent", 8, "unreadable time '1e3'"),
        ("minus", 9, "unreadable time '-1'"),
        ("digits", 10, "unreadable time '\u0663'"),
        ("minute", 11, "unreadable time '00:61:00.000'"),
        ("half", 12, "unreadable time ''"),
        ("short", 13, "3 fields instead of 8"),
        ("long", 14, "9 fields instead of 8"),
        ("good", 15, "id already used in line 2"),
        ("blank", 16, "empty text"),
        ("split", 17, "unknown split 'valdi'"),
        ("gone", 18, "video missing"),
        ("escape", 19, "video '../videos/b': expected a name without slashes"),
        ("", 20, "empty id"),
        ("", 21, "unknown split ''"),
    ]
    assert {row.file for row in corpus.rejected} == {"a.tsv"}
    without_split = {"short", "split", ""}
    assert all(row.split == ("" if row.id in without_split else "train") for row in corpus.rejected if row.line != 20)


def test_real_openasl(tmp_path: Path) -> None:
    (path,) = real("openasl/openasl-v1.0.reconstructed_dev_test.tsv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    videos = tmp_path / "videos"
    videos.mkdir()
    for row in rows:
        (videos / f"{row['yid']}.mp4").touch()
    corpus = read_corpus("openasl", [path], videos)
    assert corpus.rejected == []
    assert Counter(clip.split for clip in corpus.clips) == {"dev": 967, "test": 976}
    assert [clip.text for clip in corpus.clips] == [row["raw-text"].strip() for row in rows]
    sources = {split: {row["yid"] for row in rows if row["split"] == split} for split in ("valid", "test")}
    shared = len(sources["valid"] & sources["test"])
    assert corpus.notes["source videos in both dev and test"] == shared == 317
    assert corpus.notes["ids with dots"] == corpus.notes["ids with colons"] == 1943
    assert corpus.notes["shortest span in milliseconds"] == 200
    assert corpus.notes["longest span in milliseconds"] == 73_933
    assert corpus.notes["spans longer than 60 s"] == 1
    assert corpus.clips == [
        replace(clip, path=videos / clip.path.name) for clip in read_corpus("openasl", [path], None).clips
    ]
