from __future__ import annotations

import csv
import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path

from annotation_files import HOW2SIGN, real, reasons, write

from sltscale.data.corpora import read_corpus


def twice(text: str, encoding: str = "latin-1") -> str:
    return text.encode().decode(encoding)


def test_how2sign(tmp_path: Path) -> None:
    rows = [
        ("-v", "-v-5-rgb_front", "-v_0", "-v_0-5-rgb_front", "0.26", "6.79", twice("It’s so.")),
        ("-v", "-v-5-rgb_front", "-v_0", "-v_1-5-rgb_front", "6.5", "7", twice("Isn’t it?", "cp1252")),
        ("-v", "-v-5-rgb_front", "-v_2", "-v_2-5-rgb_front", "7", "7.45", '"""Quotes"", I say."'),
        ("w", "w-11-rgb_front", "w_0", "w_0-11-rgb_front", "1", "2", "Über alles, São Paulo â€"),
        ("w", "w-11-rgb_front", "w_1", "w_0-11-rgb_front", "1", "2", "Same name."),
        ("w", "w-11-rgb_front", "w_1", "w_1-11-rgb_front", "2", "1", "Reversed."),
        ("w", "w-11-rgb_front", "w_2", "w_2-11-rgb_front", "2.0.0", "3", "No number."),
        ("x", "x-1-rgb_front", "x_0", "x_0-1-rgb_front", "2", "3", "No video."),
    ]
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("-v-5-rgb_front.mp4", "w-11-rgb_front.mp4"):
        (videos / name).touch()
    annotations = write(tmp_path / "how2sign_realigned_val.csv", HOW2SIGN, *("\t".join(row) for row in rows))
    corpus = read_corpus("how2sign", [annotations], videos)
    assert [clip.text for clip in corpus.clips] == [
        "It’s so.",
        "Isn’t it?",
        '"Quotes", I say.',
        "Über alles, São Paulo â€",
    ]
    first = corpus.clips[0]
    assert (first.id, first.path, first.signer) == ("-v_0-5-rgb_front", videos / "-v-5-rgb_front.mp4", "5")
    assert (first.start, first.end, first.split) == (Fraction("0.26"), Fraction("6.79"), "dev")
    assert reasons(corpus.rejected) == [
        ("w_0-11-rgb_front", 6, "id already used in line 5"),
        ("w_1-11-rgb_front", 7, "ends at 1, not after its start at 2"),
        ("w_2-11-rgb_front", 8, "unreadable time '2.0.0'"),
        ("x_0-1-rgb_front", 9, "video missing"),
    ]
    assert corpus.notes == {
        "ids that begin with -": 3,
        "texts with quotation marks": 1,
        "texts with characters outside ASCII": 3,
        "shortest span in milliseconds": 450,
        "longest span in milliseconds": 6530,
        "spans shorter than 0.5 s": 1,
        "overlapping spans": 1,
        "texts repaired that were encoded as UTF-8 twice": 2,
        "clips that repeat an earlier SENTENCE_ID": 1,
    }


def test_real_how2sign() -> None:
    (path,) = real("how2sign/how2sign_realigned_test.csv")
    corpus = read_corpus("how2sign", [path], None)
    assert (len(corpus.clips), corpus.rejected) == (2357, [])
    assert {clip.split for clip in corpus.clips} == {"test"}

    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    names, spans = Counter(row["SENTENCE_ID"] for row in rows), {}
    for row in rows:
        times = Fraction(row["START_REALIGNED"]), Fraction(row["END_REALIGNED"])
        spans.setdefault(row["VIDEO_NAME"], []).append(times)
    ordered = [sorted(video) for video in spans.values()]
    overlaps = sum(later[0] < earlier[1] for video in ordered for earlier, later in itertools.pairwise(video))
    short = sum(end - start < Fraction(1, 2) for video in ordered for start, end in video)
    broken = [row["SENTENCE"] for row in rows if "â\x80" in row["SENTENCE"]]
    assert corpus.notes["overlapping spans"] == overlaps == 81
    assert corpus.notes["spans shorter than 0.5 s"] == short == 46
    assert corpus.notes["texts repaired that were encoded as UTF-8 twice"] == len(broken) == 23
    assert corpus.notes["ids that begin with -"] == sum(row["SENTENCE_NAME"][0] == "-" for row in rows) == 45
    assert corpus.notes["texts with quotation marks"] == sum('"' in row["SENTENCE"] for row in rows) == 13
    assert corpus.notes["clips that repeat an earlier SENTENCE_ID"] == len(rows) - len(names) == 380
    assert not any("â\x80" in clip.text for clip in corpus.clips)
    assert {clip.signer for clip in corpus.clips} == {"1", "2", "3", "5", "8", "10"}
