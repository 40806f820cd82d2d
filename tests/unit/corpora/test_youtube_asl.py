from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from annotation_files import cue, real, write

from sltscale.data.corpora import read_corpus


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
