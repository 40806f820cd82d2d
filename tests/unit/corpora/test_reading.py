from __future__ import annotations

import os
from pathlib import Path

import pytest
from annotation_files import HOW2SIGN, OPENASL, PHOENIX, cue, label, openasl_row, write, write_labels

from sltscale.data.annotations import tables
from sltscale.data.clips import Rejected
from sltscale.data.corpora import CORPORA, read_corpus
from sltscale.errors import InputError


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
    with pytest.raises(InputError, match="'eng lish' is no language code"):
        read_corpus("openasl", [tmp_path], tmp_path, language="eng lish")
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
