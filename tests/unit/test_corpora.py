from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from sltscale.data.annotations import tables
from sltscale.data.clips import Clip, Rejected
from sltscale.data.corpora import CORPORA, read_corpus
from sltscale.errors import InputError

OPENASL = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit"
HOW2SIGN = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"
PHOENIX = "name|video|start|end|speaker|orth|translation"
REAL = Path(__file__).parents[3] / "shared" / "annotations"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("-a.b.mp4", "b.webm", "c.gif", "c.mp4", "notes.txt"):
        (folder / name).touch()
    return folder


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def write_labels(path: Path, labels: Any) -> Path:
    path.write_bytes(gzip.compress(pickle.dumps(labels)))
    return path


def real(*names: str) -> list[Path]:
    paths = [REAL / name for name in names]
    if not all(path.is_file() for path in paths):
        pytest.skip("the real annotation files are not on this machine")
    return paths


def reasons(rejected: Sequence[Rejected]) -> list[tuple[str, int, str]]:
    return [(row.id, row.line, row.reason) for row in rejected]


def openasl_row(
    vid: str, yid: str = "b", start: str = "00:00:01.000", end: str = "00:00:02.500", text: str = "Hi."
) -> str:
    return f"{vid}\t{yid}\t{start}\t{end}\t{text}\t\t\ttrain"


def label(name: str, text: str, images: int = 2, **changes: Any) -> dict[str, Any]:
    paths = [f"{name}/images{number:04d}.png" for number in range(1, images + 1)]
    return {"name": name, "gloss": "EINS", "text": text, "length": images, "imgs_path": paths} | changes


# --- OpenASL


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


# --- files as a whole


@pytest.mark.parametrize(
    ("corpus", "header", "row"),
    [
        ("openasl", OPENASL, openasl_row("x", text="Grün.")),
        ("how2sign", HOW2SIGN, "v\tv\tx\tx\t1\t2\tGrün."),
        ("phoenix2014t", PHOENIX, "x|x/1/*.png|-1|-1|Signer01|GRUEN|grün"),
        ("folder", "file\ttext", "b.webm\tGrün."),
    ],
)
def test_unusable_files_are_one_clear_line(corpus: str, header: str, row: str, tmp_path: Path, videos: Path) -> None:
    separator = "|" if corpus == "phoenix2014t" else "\t"
    wrong = header.replace(separator, ",")
    column = header.split(separator)[-1]
    cases = {
        "empty": (b"", "is empty"),
        "blank": (b"\n \n", "is empty"),
        "header": (f"{header}\n".encode(), "no rows"),
        "commas": (f"{wrong}\nx\n".encode(), "separated by ',' in its first line, expected .* separated by"),
        "column": (f"{header}_\n{row}\n".encode(), f"column '{column}' is missing; the nearest is '{column}_'"),
        "twice": (f"{header}{separator}{column}\n{row}{separator}x\n".encode(), f"column '{column}' is there twice"),
        "latin": (f"{header}\n{row}\n".encode("latin-1"), "line 2: not UTF-8"),
        "utf16": (f"{header}\n{row}\n".encode("utf-16"), "line 1: not UTF-8"),
        "video": (b"\x00\x00\x00\x20ftypisom\xff\xfe", "line 1: not UTF-8"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.train.tsv"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            read_corpus(corpus, [path], videos)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        read_corpus(corpus, [tmp_path / "missing.train.tsv"], videos)
    os.mkfifo(tmp_path / "pipe.train")
    for never_ends in (tmp_path, tmp_path / "pipe.train", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            read_corpus(corpus, [never_ends], videos, split="train")
    with pytest.raises(InputError, match=r"folder .*nowhere: No such file"):
        read_corpus(corpus, [write(tmp_path / "a.train.tsv", header, row)], tmp_path / "nowhere")


def test_too_large_a_file_is_refused_unread(tmp_path: Path, videos: Path) -> None:
    for name, corpus in (("a.tsv", "openasl"), ("labels.train", "csl_daily")):
        with (tmp_path / name).open("wb") as file:
            file.write(b"\x1f\x8b")
            file.truncate(tables.MAX_BYTES + 1)
        with pytest.raises(InputError, match=f"{tables.MAX_BYTES + 1} bytes, expected at most"):
            read_corpus(corpus, [tmp_path / name], videos)


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, videos: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{OPENASL}\r\n{openasl_row('x')}\r\n".encode())
    assert [clip.id for clip in read_corpus("openasl", [path], videos).clips] == ["x"]


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean openasl"):
        read_corpus("open_asl", [tmp_path], tmp_path)
    with pytest.raises(InputError, match="known: phoenix2014t"):
        read_corpus("zzz", [tmp_path], tmp_path)
    with pytest.raises(InputError, match="unknown split 'valid'"):
        read_corpus("openasl", [tmp_path], tmp_path, split="valid")
    with pytest.raises(InputError, match="openasl has no caption files"):
        read_corpus("openasl", [tmp_path], tmp_path, captions=tmp_path)
    with pytest.raises(InputError, match="needs the folder of caption files"):
        read_corpus("youtube_asl", [tmp_path], None)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("how2sign_realigned_val.csv", "dev"),
        ("labels.test", "test"),
        ("PHOENIX-2014-T.train.corpus.csv", "train"),
        ("x_validation.tsv", "dev"),
        ("DEV.csv", "dev"),
    ],
)
def test_file_names_tell_the_split(name: str, split: str, tmp_path: Path) -> None:
    annotations = write(tmp_path / name, "file\ttext", "b.mp4\tHi.")
    assert [clip.split for clip in read_corpus("folder", [annotations], None, split="test").clips] == [split]


@pytest.mark.parametrize("name", ["latest.csv", "dev_test.csv", "contest.tsv", "a.tsv"])
def test_where_nothing_tells_the_split_it_is_asked_for(name: str, tmp_path: Path) -> None:
    annotations = write(tmp_path / name, "file\ttext", "b.mp4\tHi.")
    assert read_corpus("folder", [annotations], None, split="test").clips[0].split == "test"
    with pytest.raises(InputError, match="neither its name nor its rows tell the split; give --split"):
        read_corpus("folder", [annotations], None)


def test_several_files_are_one_corpus_with_ids_used_once(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{split}.tsv", "file\ttext", "b.mp4\tHi.") for split in ("train", "test")]
    corpus = read_corpus("folder", files, None)
    assert [(clip.id, clip.split) for clip in corpus.clips] == [("b", "train")]
    assert corpus.rejected == [Rejected("b.mp4", 2, "id already used in line 2 of train.tsv", "test", "test.tsv")]


# --- PHOENIX-2014T


def test_phoenix_official_files(tmp_path: Path) -> None:
    annotations = write(
        tmp_path / "PHOENIX-2014-T.dev.corpus.csv",
        PHOENIX,
        "01April_2010-1|01April_2010-1/1/*.png|-1|-1|Signer04|MORGEN SONNE|morgen scheint überall die sonne ",
        "b|b/1/*.png|-1|-1|Signer05|WIND|wind",
        "c|c/1/*.png|-1|-1|Signer05|WIND|sturm",
        "d|d/1/*.png|-1|-1|Signer05|WIND|böen",
        "part|part/1/*.png|5|9|Signer05|WIND|wind",
        "gone|gone/1/*.png|-1|-1|Signer05|WIND|wind",
        "up|../1/*.png|-1|-1|Signer05|WIND|wind",
        "root|/etc/*.png|-1|-1|Signer05|WIND|wind",
        "short|short/1/*.png|-1",
    )
    videos = tmp_path / "fullFrame-210x260px"
    for folder in ("dev/01April_2010-1/1", "01April_2010-1", "dev/b", "b/1", "c/1", "d", "train/gone/1"):
        (videos / folder).mkdir(parents=True)
    corpus = read_corpus("phoenix2014t", [annotations], videos)
    assert [clip.path.relative_to(videos).as_posix() for clip in corpus.clips] == [
        "dev/01April_2010-1/1",
        "dev/b",
        "c/1",
        "d",
    ]
    assert corpus.clips[0] == Clip(
        "01April_2010-1",
        videos / "dev/01April_2010-1/1",
        None,
        None,
        "morgen scheint überall die sonne",
        "de",
        "dev",
        2,
        signer="Signer04",
        fps=Fraction(25),
        file=annotations.name,
    )
    assert reasons(corpus.rejected) == [
        ("part", 6, "start '5', end '9': expected -1 and -1, all of the images"),
        ("gone", 7, "video missing"),
        ("up", 8, "file '../1' leads outside the folder of videos"),
        ("root", 9, "file '/etc' leads outside the folder of videos"),
        ("short", 10, "3 fields instead of 7"),
    ]
    looked_up_nowhere = read_corpus("phoenix2014t", [annotations], None)
    assert [clip.id for clip in looked_up_nowhere.clips] == ["01April_2010-1", "b", "c", "d", "gone"]


def test_phoenix_labels(tmp_path: Path) -> None:
    labels = {
        "train/a": label("train/a", "schöner Tag", 3),
        "dev/b": label("dev/b", "schöner Tag", 2, signer="Signer01", length=7),
        "c": label("test/c", "Wind"),
        "train/text": label("train/text", "") | {"text": 5},
        "train/none": {"name": "train/none", "imgs_path": ["x/1.png"]},
        "train/empty": label("train/empty", " "),
        "train/images": label("train/images", "x", 0),
        "train/number": label("train/number", "x", imgs_path=[1]),
        "train/two": label("train/two", "x", imgs_path=["train/two/1.png", "train/too/2.png"]),
        "train/up": label("train/up", "x", imgs_path=["../../etc/1.png"]),
        "train/half": label("train/half", "\ud83d"),
        "train/gone": label("train/gone", "x"),
    }
    videos = tmp_path / "frames"
    for folder in ("train/a", "dev/b/1", "c", "train/half", "train/empty"):
        (videos / folder).mkdir(parents=True)
    corpus = read_corpus("phoenix2014t", [write_labels(tmp_path / "labels.test", labels)], videos)
    assert [(clip.id, clip.split, clip.signer, clip.line) for clip in corpus.clips] == [
        ("train/a", "train", "", 1),
        ("dev/b", "dev", "Signer01", 2),
        ("c", "test", "", 3),
    ]
    assert [clip.path.relative_to(videos).as_posix() for clip in corpus.clips] == ["train/a", "dev/b/1", "c"]
    first = corpus.clips[0]
    assert first.images == ("images0001.png", "images0002.png", "images0003.png")
    assert (first.fps, first.start, first.end, first.language) == (Fraction(25), None, None, "de")
    assert reasons(corpus.rejected) == [
        ("train/text", 4, "'text' is of type int"),
        ("train/none", 5, "'text' is missing"),
        ("train/empty", 6, "empty text"),
        ("train/images", 7, "'imgs_path' is not a list of names"),
        ("train/number", 8, "'imgs_path' is not a list of names"),
        ("train/two", 9, "its images lie in 2 folders, expected one"),
        ("train/up", 10, "file '../../etc' leads outside the folder of videos"),
        ("train/half", 11, "half of a surrogate pair in its id, text, signer or file"),
        ("train/gone", 12, "video missing"),
    ]
    assert {row.file for row in corpus.rejected} == {"labels.test"}
    assert corpus.notes == {
        "ids with slashes": 2,
        "texts with characters outside ASCII": 2,
        "dev: clips whose text is also in train": 1,
        "fewest images of a clip": 2,
        "most images of a clip": 3,
        "labels whose length is not their number of images": 1,
    }


def test_real_phoenix_labels() -> None:
    paths = real(*(f"phoenix2014t/labels.{split}" for split in ("train", "dev", "test")))
    corpus = read_corpus("phoenix2014t", paths, None)
    assert corpus.rejected == []
    assert Counter(clip.split for clip in corpus.clips) == {"train": 7096, "dev": 519, "test": 642}
    lengths = [len(clip.images) for clip in corpus.clips]
    assert (min(lengths), max(lengths)) == (16, 475)
    assert (corpus.notes["fewest images of a clip"], corpus.notes["most images of a clip"]) == (16, 475)
    assert sum(lengths[:7096]) == 827_354
    assert corpus.clips[0].path.as_posix() == corpus.clips[0].id

    texts = {split: [] for split in ("train", "dev", "test")}
    for path in paths:  # test input of our own choosing
        for entry in pickle.loads(gzip.decompress(path.read_bytes())).values():  # noqa: S301
            texts[path.suffix[1:]].append(entry["text"])
    assert [clip.text for clip in corpus.clips] == [text for split in texts.values() for text in split]
    foreign = [text for split in texts.values() for text in split if any(ord(letter) > 127 for letter in text)]
    assert corpus.notes["texts with characters outside ASCII"] == len(foreign) == 6222  # 75 %
    repeats = corpus.notes["train: clips that repeat an earlier text of the split"]
    assert repeats == len(texts["train"]) - len(set(texts["train"])) == 243
    for split, count in (("dev", 25), ("test", 32)):
        shared = sum(text in set(texts["train"]) for text in texts[split])
        assert corpus.notes[f"{split}: clips whose text is also in train"] == shared == count


def test_real_phoenix_official_form() -> None:
    (path,) = real("phoenix2014t/PHOENIX-2014-T.dev.corpus.dummy.csv")
    corpus = read_corpus("phoenix2014t", [path], None)
    assert corpus.rejected == []
    (clip,) = corpus.clips
    assert (clip.split, clip.signer, clip.path.name, clip.fps) == ("dev", "Signer01", "1", 25)


# --- CSL-Daily


def test_csl_daily(tmp_path: Path) -> None:
    labels = {
        name: label(name, text, 2, gloss=["你", "好"])
        for name, text in (
            ("S000001_P0004_T00", "你好，世界。"),
            ("S000001_P0007_T00", "你好，世界。"),
            ("S000002_P0004_T01", "再见"),
            ("other", "再见!"),
        )
    }
    videos = tmp_path / "frames"
    (videos / "S000001_P0004_T00").mkdir(parents=True)
    (videos / "other").mkdir()
    (videos / "S000001_P0007_T00.mp4").touch()
    path = write_labels(tmp_path / "labels.dev", labels)
    corpus = read_corpus("csl_daily", [path], videos)
    folder, video, other = corpus.clips
    assert (folder.path, folder.fps, folder.signer) == (videos / "S000001_P0004_T00", Fraction(30), "P0004")
    assert folder.images == ("images0001.png", "images0002.png")
    assert (folder.language, folder.split, folder.text) == ("zh", "dev", "你好，世界。")
    assert (video.path, video.images, video.fps) == (videos / "S000001_P0007_T00.mp4", (), None)
    assert (other.signer, corpus.notes["ids that do not name their signer"]) == ("", 1)
    assert reasons(corpus.rejected) == [("S000002_P0004_T01", 3, "video missing")]
    assert corpus.notes["texts that NFKC normalisation changes"] == 2
    assert corpus.notes["dev: clips that repeat an earlier text of the split"] == 1
    # The name says nothing, so it is asked for.
    path = path.rename(tmp_path / "labels")
    assert read_corpus("csl_daily", [path], None, split="test", language="zh-CN").clips[3].language == "zh-CN"
    with pytest.raises(InputError, match="give --split"):
        read_corpus("csl_daily", [path], None)


# --- How2Sign


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


# --- OpenASL, real


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


# --- YouTube-ASL


def cue(start: str, end: str, text: str) -> str:
    return f"00:{start} --> 00:{end}\n{text}\n"


@pytest.fixture
def youtube(tmp_path: Path) -> Path:
    """ids.txt and one folder with videos and captions."""
    folder = tmp_path / "youtube"
    folder.mkdir()
    cues = [
        cue("00:01.000", "00:03.500", "  Hello &amp; <i>welcome</i>,\nall.  "),
        cue("00:03.000", "00:04.000", "[ Music ]"),
        cue("00:03.000", "00:04.000", "[ Music ]"),
        cue("00:05.000", "00:05.000", "No time."),
        cue("00:06.000", "00:05.000", "Reversed."),
        cue("00:06.000", "00:06.199", "Too short."),
        cue("00:06.000", "00:06.200", "Long enough."),
        cue("00:10.000", "01:10.000", "A minute."),
        cue("01:10.000", "02:10.001", "More."),
        cue("02:20.000", "02:25.000", "x" * 300),
        cue("02:25.000", "02:30.000", "x" * 301),
        cue("02:30.000", "02:31.000", "\u2669\u266a \U0001d800 ?"),
        cue("02:31.000", "2:32.000", "Bad time."),
        cue("02:33.000", "02:34.000", "   "),
        cue("00:06.000", "00:06.200", "Another text."),
    ]
    (folder / "-ab_CD-9.zZ.en.vtt").write_text("WEBVTT\n\n" + "\n".join(cues), encoding="utf-8")
    (folder / "second.vtt").write_text("WEBVTT\n\n" + cue("00:01.000", "00:02.000", "Hi."), encoding="utf-8")
    (folder / "latin.vtt").write_bytes("WEBVTT\n\nGrün".encode("latin-1"))
    (folder / "srt.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHi.\n", encoding="utf-8")
    (folder / "german.de.vtt").write_text("WEBVTT\n", encoding="utf-8")
    for name in ("-ab_CD-9.zZ", "second", "latin", "srt", "german", "silent"):
        (folder / f"{name}.mp4").touch()
    ids = ("-ab_CD-9.zZ", "second", "second", "latin", "srt", "german", "silent", "gone", "a,b", "../second", "")
    write(folder / "ids.txt", *ids)
    return folder


def test_a_caption_is_a_clip_with_its_text_untouched(youtube: Path) -> None:
    corpus = read_corpus("youtube_asl", [youtube / "ids.txt"], youtube)
    first = corpus.clips[0]
    assert first.text == "  Hello &amp; <i>welcome</i>,\nall.  "
    assert (first.id, first.path) == ("-ab_CD-9.zZ-1", youtube / "-ab_CD-9.zZ.mp4")
    assert (first.start, first.end, first.split, first.language) == (Fraction(1), Fraction(7, 2), "train", "en")
    assert first.line == 3
    assert [clip.id for clip in corpus.clips[1:]] == [
        *(f"-ab_CD-9.zZ-{number}" for number in (2, 3, 7, 8, 10, 12, 15)),
        "second-1",
        "srt-1",
    ]
    assert [(row.id, row.file, row.reason) for row in corpus.rejected] == [
        ("-ab_CD-9.zZ-4", "-ab_CD-9.zZ.en.vtt", "lasts 0.000 s, under 0.2 s"),
        ("-ab_CD-9.zZ-5", "-ab_CD-9.zZ.en.vtt", "ends at 5.000 s, before its start at 6.000 s"),
        ("-ab_CD-9.zZ-6", "-ab_CD-9.zZ.en.vtt", "lasts 0.199 s, under 0.2 s"),
        ("-ab_CD-9.zZ-9", "-ab_CD-9.zZ.en.vtt", "lasts 60.001 s, over 60.0 s"),
        ("-ab_CD-9.zZ-11", "-ab_CD-9.zZ.en.vtt", "301 characters, over 300"),
        ("-ab_CD-9.zZ-13", "-ab_CD-9.zZ.en.vtt", "unreadable times '00:02:31.000 --> 00:2:32.000'"),
        ("-ab_CD-9.zZ-14", "-ab_CD-9.zZ.en.vtt", "empty text"),
        ("second", "ids.txt", "id already used in line 2"),
        ("latin", "latin.vtt", "line 3: not UTF-8 (byte 10); convert the file to UTF-8"),
        ("german", "ids.txt", "no captions in language en; found de"),
        ("silent", "ids.txt", "no captions in language en"),
        ("gone", "ids.txt", "video missing"),
        ("a,b", "ids.txt", "expected one video id and nothing else in the line"),
        ("../second", "ids.txt", "video '../second': expected a name without slashes"),
    ]
    assert corpus.rejected[1].line == 16 and corpus.rejected[-1].line == 10
    assert corpus.notes == {
        "ids that begin with -": 8,
        "ids with dots": 8,
        "texts of several lines": 1,
        "texts with markup (tags or entities)": 1,
        "texts that are only a note in brackets": 2,
        "texts without a letter or digit": 1,
        "texts with characters outside ASCII": 1,
        "train: clips that repeat an earlier text of the split": 2,
        "shortest span in milliseconds": 200,
        "longest span in milliseconds": 60_000,
        "spans shorter than 0.5 s": 2,
        "overlapping spans": 3,
        "clips with the span and text of another": 1,
        "caption files read": 3,
    }


def test_the_nearest_caption_file_is_taken(youtube: Path) -> None:
    captions = youtube / "captions"
    captions.mkdir()
    write(youtube / "ids.txt", "second")

    def taken(**options: Any) -> str:
        corpus = read_corpus("youtube_asl", [youtube / "ids.txt"], youtube, captions=captions, **options)
        return corpus.clips[0].text

    names = ("second.en-GB.srt", "second.srt", "second.en.srt", "second.en.vtt", "second.de.vtt")
    for name in names[:-1]:
        head = "WEBVTT\n\n" if name.endswith(".vtt") else ""
        (captions / name).write_text(head + cue("00:01.000", "00:02.000", name), encoding="utf-8")
        assert taken() == name
    (captions / "second.de.vtt").write_text("WEBVTT\n\n" + cue("00:01.000", "00:02.000", "de"), encoding="utf-8")
    assert taken() == "second.en.vtt"
    assert taken(language="de", split="dev") == "de"


def test_real_captions(tmp_path: Path) -> None:
    (path,) = real("vtt/demo.vtt")
    lines = path.read_text(encoding="utf-8").split("\n")
    ids = write(tmp_path / "ids.txt", "demo")
    corpus = read_corpus("youtube_asl", [ids], None, captions=path.parent)
    timings = [number for number, line in enumerate(lines) if "-->" in line]
    assert len(corpus.clips) + len(corpus.rejected) == len(timings) == 64
    assert [row.reason for row in corpus.rejected] == ["lasts 0.160 s, under 0.2 s"]
    for clip in corpus.clips:
        assert clip.text == lines[clip.line]  # the line after its times, numbered from 1
        start, end = (Fraction(time[-6:]) for time in lines[clip.line - 1].split(" --> "))
        assert (clip.start, clip.end) == (start, end)


@pytest.mark.slow
def test_youtube_asl_at_its_size(tmp_path: Path) -> None:
    """610,193 captions of 11,093 videos; measured figures are in docs/corpora.md."""
    counts = [55] * 11_093
    for number in range(610_193 - sum(counts)):
        counts[number] += 1
    for video, count in enumerate(counts):
        cues = (
            cue(f"{n // 60:02d}:{n % 60:02d}.000", f"{n // 60:02d}:{n % 60:02d}.999", f"Text {n}.")
            for n in range(count)
        )
        (tmp_path / f"v{video}.vtt").write_text("WEBVTT\n\n" + "\n".join(cues), encoding="utf-8")
    write(tmp_path / "ids.txt", *(f"v{video}" for video in range(len(counts))))
    corpus = read_corpus("youtube_asl", [tmp_path / "ids.txt"], None, captions=tmp_path)
    assert (len(corpus.clips), corpus.rejected) == (610_193, [])


# --- folder


def test_folder_of_videos_from_a_table_or_json(tmp_path: Path, videos: Path) -> None:
    (videos / "sub").mkdir()
    (videos / "sub" / "d.mp4").touch()
    rows: list[dict[str, Any]] = [
        {"file": "b.webm", "text": " Hello. "},
        {"file": "sub/d.mp4", "text": "Tschüss.", "start": 0.1, "end": "00:00:02.500", "language": "de"},
        {
            "id": "me/1:a.b",
            "file": "c.mp4",
            "text": "Hi.",
            "split": "validation",
            "signer": "S1",
            "crop": [8, 0, 64, 48],
        },
        {"file": "c.mp4", "text": "To the end.", "start": 1},
        {"file": "../secret.mp4", "text": "x"},
        {"file": "/etc/passwd", "text": "x"},
        {"file": "sub", "text": "x"},
        {"file": "", "text": "x"},
        {"file": "c.gif", "text": "x", "start": 2, "end": 1},
        {"file": "c.gif", "text": "x", "end": "soon"},
        {"file": "c.gif", "text": "x", "crop": "0,0,0,5"},
        {"file": "c.gif", "text": "x", "crop": "0,0,5,0"},
        {"file": "c.gif", "text": "x", "crop": "1,2,3"},
        {"file": "c.gif", "text": "x", "language": "eng lish"},
        {"file": "c.gif", "text": "x", "split": "tset"},
        {"file": "c.gif", "text": ""},
        {"file": "b.webm", "text": "again"},
    ]
    columns = ("id", "file", "text", "start", "end", "language", "split", "signer", "crop", "remark")

    def cell(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    table = ["\t".join(cell(row.get(column, "")) for column in columns) for row in rows]
    files = [
        write(tmp_path / "list.train.tsv", "\t".join(columns), *table),
        write(tmp_path / "list.train.jsonl", *map(json.dumps, rows)),
    ]
    for file, first_line in zip(files, (2, 1), strict=True):
        corpus = read_corpus("folder", [file], videos)
        assert {clip.file for clip in corpus.clips} == {file.name}
        assert [replace(clip, file="") for clip in corpus.clips] == [
            Clip("b", videos / "b.webm", None, None, "Hello.", "en", "train", first_line),
            Clip(
                "sub/d-0.1-00:00:02.500",
                videos / "sub/d.mp4",
                Fraction(1, 10),
                Fraction(5, 2),
                "Tschüss.",
                "de",
                "train",
                first_line + 1,
            ),
            Clip("me/1:a.b", videos / "c.mp4", None, None, "Hi.", "en", "dev", first_line + 2, "S1", (8, 0, 64, 48)),
            Clip("c-1", videos / "c.mp4", Fraction(1), None, "To the end.", "en", "train", first_line + 3),
        ]
        assert [(row.line - first_line, row.reason) for row in corpus.rejected] == [
            (4, "file '../secret.mp4' leads outside the folder of videos"),
            (5, "file '/etc/passwd' leads outside the folder of videos"),
            (6, "video missing"),
            (7, "file '' leads outside the folder of videos"),
            (8, "ends at 1, not after its start at 2"),
            (9, "unreadable time 'soon'"),
            (10, "crop '0,0,0,5': expected left,top,width,height in pixels"),
            (11, "crop '0,0,5,0': expected left,top,width,height in pixels"),
            (12, "crop '1,2,3': expected left,top,width,height in pixels"),
            (13, "'eng lish' is no language code such as de or en-US"),
            (14, "unknown split 'tset'"),
            (15, "empty text"),
            (16, f"id already used in line {first_line}"),
        ]
        assert corpus.notes.get("column 'remark' is not used") == (4 if first_line == 2 else None)


def test_folder_json_lines_that_are_none(tmp_path: Path, videos: Path) -> None:
    annotations = write(
        tmp_path / "train.jsonl",
        '{"file": "b.webm", "text": "Good.", "id": null}',
        '{"file": "b.webm", "text": "Cut',
        '["b.webm", "A list."]',
        '{"file": "b.webm"}',
        '{"text": "No file."}',
        '{"id": "deep", "file": "b.webm", "text": {"en": "Hi."}}',
        '{"id": "truth", "file": "b.webm", "text": true}',
        '{"id": "texts", "file": "b.webm", "text": ["a", "b"]}',
        '{"id": "nan", "file": "b.webm", "text": "x", "start": NaN, "end": Infinity}',
        '{"id": "half\\ud800", "file": "b.webm", "text": "x"}',
        "[" * 100_000,
    )
    corpus = read_corpus("folder", [annotations], videos)
    assert [clip.id for clip in corpus.clips] == ["b"]
    found = [(row.id, row.line, row.reason) for row in corpus.rejected]
    assert found[0][2].startswith("not JSON (Unterminated string")
    assert found[1:8] == [
        ("", 3, "not a JSON object"),
        ("b.webm", 4, "'text' is missing"),
        ("", 5, "'file' is missing"),
        ("deep", 6, "'text' is neither text nor a number"),
        ("truth", 7, "'text' is neither text nor a number"),
        ("texts", 8, "'text' is neither text nor a number"),
        ("nan", 9, "unreadable time 'NaN'"),
    ]
    assert found[8] == ("half\\ud800", 10, "half of a surrogate pair in its id, text, signer or file")
    assert found[9][1:] == (11, "not JSON (maximum recursion depth exceeded)") or found[9][2].startswith("not JSON")
    json.dumps([row.__dict__ for row in corpus.rejected], ensure_ascii=False).encode()


# --- notes


def test_odd_characters_are_noted(tmp_path: Path) -> None:
    texts = (
        "a\u202eb",
        "a\x07b",
        "a\ufffdb",
        "\ue001 x",
        "&nbsp;a",
        "a < b & c > d",
        "[laughs]",
        "(ON) you",
        "...",
        "ﬁn",
    )
    rows = (f"{number}.mp4\t{text}" for number, text in enumerate(texts))
    corpus = read_corpus("folder", [write(tmp_path / "test.tsv", "file\ttext", *rows)], None)
    assert corpus.notes == {
        "texts with bidirectional controls": 1,
        "texts with control characters": 1,
        "texts with unreadable characters (U+FFFD, private use)": 2,
        "texts with markup (tags or entities)": 2,
        "texts that are only a note in brackets": 1,
        "texts without a letter or digit": 1,
        "texts with characters outside ASCII": 4,
        "texts that NFKC normalisation changes": 1,
    }


@pytest.mark.parametrize("name", CORPORA)
def test_nothing_is_looked_up_without_a_folder_of_videos(name: str, tmp_path: Path) -> None:
    line = {
        "phoenix2014t": f"{PHOENIX}\nx|x/1/*.png|-1|-1|S|X|x",
        "how2sign": f"{HOW2SIGN}\nv\tv\tx\tx\t1\t2\tx",
        "openasl": f"{OPENASL}\n{openasl_row('x')}",
        "youtube_asl": "x",
        "folder": "file\ttext\nx.mp4\tx",
    }
    annotations = tmp_path / "a.train"
    if name == "csl_daily":
        write_labels(annotations, {"S1_P1_T1": label("S1_P1_T1", "x")})
    else:
        write(annotations, line[name])
    (tmp_path / "x.vtt").write_text("WEBVTT\n\n" + cue("00:01.000", "00:02.000", "x"), encoding="utf-8")
    options = {"captions": tmp_path} if name == "youtube_asl" else {}
    corpus = read_corpus(name, [annotations], None, **options)
    assert [clip.path.is_absolute() for clip in corpus.clips] == [False]
    assert corpus.rejected == []
