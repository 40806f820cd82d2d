from __future__ import annotations

from pathlib import Path

import pytest

from sltscale.data.annotations.captions import Cue, read_cues
from sltscale.data.annotations.tables import BadRow


def cues(path: Path, content: str) -> list[Cue]:
    path.write_bytes(content.encode())
    return list(read_cues(path))


WEBVTT = """WEBVTT - a title
Kind: captions
Language: en

NOTE a remark
over two lines

STYLE
::cue { color: red }

REGION
id:fred

00:01.000 --> 00:02.500 align:start position:0%
<v Ann>Hello</v> &amp; <00:01.500><c>welcome</c>,
  second line  

introduction
100:00:03.000-->100:00:04.000
A cue with a name.

00:00:05.000 --> 00:00:06.000

00:00:07.000 --> 00:00:08.000
 
A line of one space before this.
"""


def test_webvtt(tmp_path: Path) -> None:
    text = "<v Ann>Hello</v> &amp; <00:01.500><c>welcome</c>,\n  second line  "
    expected = [
        Cue(1, 14, 1000, 2500, text),
        Cue(2, 19, 360_003_000, 360_004_000, "A cue with a name."),
        Cue(3, 22, 5000, 6000, ""),
        Cue(4, 24, 7000, 8000, " \nA line of one space before this."),
    ]
    assert cues(tmp_path / "a.vtt", WEBVTT) == expected
    assert cues(tmp_path / "a.vtt", WEBVTT.replace("\n", "\r\n")) == expected
    assert cues(tmp_path / "a.vtt", "\ufeff" + WEBVTT.rstrip("\n")) == expected


def test_subrip(tmp_path: Path) -> None:
    content = (
        "1\r\n00:00:01,000 --> 00:00:02,500\r\n<i>Hi</i>\r\nthere\r\n \r\n2\r\n00:01:00,000 --> 00:01:01,000\r\nBye"
    )
    assert cues(tmp_path / "a.srt", content) == [
        Cue(1, 2, 1000, 2500, "<i>Hi</i>\nthere"),
        Cue(2, 7, 60_000, 61_000, "Bye"),
    ]


@pytest.mark.parametrize(
    ("timing", "fault"),
    [
        ("00:00:01.000 --> nan", "unreadable times '00:00:01.000 --> nan'"),
        ("00:01.00 --> 00:02.000", "unreadable times '00:01.00 --> 00:02.000'"),
        ("00:61.000 --> 01:02.000", "unreadable times '00:61.000 --> 01:02.000'"),
        ("-00:01.000 --> 00:02.000", "unreadable times '-00:01.000 --> 00:02.000'"),
        ("00:01.000 -->", "unreadable times '00:01.000 -->'"),
        ("00:01.000 --> 00:02.000x", "unreadable times '00:01.000 --> 00:02.000x'"),
        ("00:01.000 00:02.000", "no times before the text '00:01.000 00:02.000'"),
    ],
)
def test_a_bad_cue_does_not_stop_the_others(timing: str, fault: str, tmp_path: Path) -> None:
    good = "00:03.000 --> 00:04.000\nGood.\n"
    for suffix, head in ((".vtt", "WEBVTT\n\n"), (".srt", "")):
        first, second = cues(tmp_path / f"a{suffix}", f"{head}{timing}\nBad.\n\n{good}")
        assert (first.number, first.line, first.fault) == (1, 1 + 2 * bool(head), fault)
        assert (second.number, second.text, second.fault) == (2, "Good.", "")


def test_cues_that_run_into_each_other_are_seen(tmp_path: Path) -> None:
    (cue,) = cues(tmp_path / "a.srt", "1\n00:00:01,000 --> 00:00:02,000\nHi\n2\n00:00:03,000 --> 00:00:04,000\nBye")
    assert cue.fault == "no empty line before the times in line 5"


def test_times_are_kept_as_they_are(tmp_path: Path) -> None:
    (cue,) = cues(tmp_path / "a.vtt", "WEBVTT\n\n00:02.000 --> 00:01.000\nReversed.")
    assert (cue.start, cue.end, cue.fault) == (2000, 1000, "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"1\n00:00:01,000 --> 00:00:02,000\nHi.\n", "not WebVTT: begins with '1', expected 'WEBVTT'"),
        (b"WEBVTTX\n", "not WebVTT: begins with 'WEBVTTX'"),
        (b"WEBVTT\n\n00:01.000 --> 00:02.000\nGr\xfcn.\n", "line 4: not UTF-8"),
        ("WEBVTT\n".encode("utf-16"), "line 1: not UTF-8"),
    ],
)
def test_files_that_are_no_captions(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.vtt"
    path.write_bytes(content)
    with pytest.raises(BadRow, match=reason):
        list(read_cues(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match="No such file"):
        list(read_cues(tmp_path / "a.vtt"))


def test_a_file_without_cues_has_none(tmp_path: Path) -> None:
    assert cues(tmp_path / "a.vtt", "WEBVTT\n") == []
    assert cues(tmp_path / "a.vtt", "WEBVTT\n\nNOTE nothing\n") == []
