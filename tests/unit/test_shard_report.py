from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from source_videos import write_video

from sltscale.cli import main
from sltscale.data.clips import Clip, Cutting, Rejected
from sltscale.data.shards.report import write_shard_report
from sltscale.data.shards.text_checks import foreign_characters, normalised, words
from sltscale.data.shards.writing import write_shards
from sltscale.errors import InputError

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"
# (id, video, text, signer) by split.
TRAIN = [
    ("t0", "a.mp4", "Am Abend Regen.", "s1"),
    ("t1", "a.mp4", "Am Abend Regen.", "s1"),
    ("t2", "b.mp4", "Morgen: Sonne!", "s2"),
    ("t3", "b.mp4", SCRIPT, "s2"),
    ("t4", "b.mp4", "Heute Смог und Ｎebel", "s1"),
    ("t5", "b.mp4", "Regen am Abend", "s1"),
]
TEST = [
    ("e0", "b.mp4", "morgen  sonne", ""),
    ("e1", "c.mp4", "Am Abend Regen.", ""),
    ("e2", "c.mp4", "Ganz neu\u200b", ""),
]
REJECTED = [
    Rejected("bad1", 7, "video missing", "train", "labels.tsv"),
    Rejected("bad2", 9, "video missing", "train", "labels.tsv"),
    Rejected("bad3", 12, f"unreadable time '{SCRIPT}'", "", "labels.tsv"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_video(folder / "a.mp4", 20)
    write_video(folder / "b.mp4", 50, height=64, width=48)
    write_video(folder / "c.mp4", 30, rate=30)
    for split, rows in (("train", TRAIN), ("test", TEST)):
        clips = [
            Clip(id, folder / video, None, None, text, "de", split, line, signer=signer)
            for line, (id, video, text, signer) in enumerate(rows, start=1)
        ]
        rejected = [row for row in REJECTED if row.split in (split, "")]
        write_shards(
            clips, rejected, folder / "shards", split=split, corpus="<b>news", cutting=Cutting(96), progress=False
        )
    return folder / "shards"


@pytest.fixture(scope="module")
def facts(shards: Path) -> dict:
    return json.loads((shards / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def html(shards: Path) -> str:
    return (shards / "report.html").read_text(encoding="utf-8")


def test_totals_and_histograms(facts: dict) -> None:
    train, test = facts["splits"]["train"], facts["splits"]["test"]
    assert (train["clips"], train["frames"], train["sources"], train["signers"]) == (6, 2 * 20 + 4 * 50, 2, 2)
    assert (test["clips"], test["frames"], test["sources"], test["signers"]) == (3, 50 + 2 * 30, 2, 0)
    assert train["hours"] == pytest.approx((2 * 0.8 + 4 * 2) / 3600)
    for name in ("seconds", "frames", "characters"):
        histogram = facts["histograms"][name]
        assert [sum(histogram["counts"][split]) for split in ("train", "test")] == [6, 3]
        assert all(len(counts) == len(histogram["edges"]) for counts in histogram["counts"].values())
    frames = facts["histograms"]["frames"]
    bins = dict(zip(frames["edges"], frames["counts"]["train"], strict=True))
    assert {edge: count for edge, count in bins.items() if count} == {20: 2, max(bins): 4}
    assert facts["histograms"]["fps"] == {"values": ["25.0", "30.0"], "counts": {"train": [6, 0], "test": [1, 2]}}
    assert facts["histograms"]["resolution"] == {
        "values": ["48 x 64", "64 x 48"],
        "counts": {"train": [4, 2], "test": [1, 2]},
    }


def test_duplicates_within_and_across(facts: dict) -> None:
    exact, near, same_words = (facts["duplicate_texts"][rule] for rule in ("exact", "normalised", "same_words"))
    assert [rule["within"] for rule in (exact, near, same_words)] == [
        {"train": 1, "test": 0},
        {"train": 1, "test": 0},
        {"train": 2, "test": 0},
    ]
    across = exact["across"]["train and test"]
    assert (across["texts"], across["clips"]) == (1, {"train": 2, "test": 1})
    assert across["examples"] == [{"text": "Am Abend Regen.", "ids": ["t0", "e1"]}]
    across = near["across"]["train and test"]
    assert (across["texts"], across["clips"]) == (2, {"train": 3, "test": 2})
    assert across["examples"][0] == {"text": "morgen  sonne", "ids": ["t2", "e0"]}
    assert same_words["across"]["train and test"]["clips"] == {"train": 4, "test": 2}
    assert exact["most_frequent"] == [{"split": "train", "clips": 2, "text": "Am Abend Regen."}]


def test_shared_sources_characters_and_rejects(facts: dict) -> None:
    assert facts["shared_sources"] == {"train and test": {"sources": 1, "examples": ["b.mp4"]}}
    train, test = (facts["foreign_characters"][split]["de"] for split in ("train", "test"))
    assert train["expected"] == ["LATIN"] and train["different"] == 4
    assert {row["character"] for row in train["characters"]} == set("Смог")
    assert {(row["count"], row["first"]) for row in train["characters"]} == {(1, "t4")}
    assert [(row["name"], row["first"]) for row in test["characters"]] == [("ZERO WIDTH SPACE", "e2")]
    # The row without a split stands in both reports of the splits and counts once here.
    assert [(kind["reason"], kind["count"]) for kind in facts["rejected"]] == [
        ("video missing", 2),
        ("unreadable time _", 1),
    ]
    first = facts["rejected"][0]["examples"][0]
    assert (first["file"], first["line"], first["id"]) == ("labels.tsv", 7, "bad1")


class Page(HTMLParser):
    """Tags, attributes and text of a page; whatever is opened must be closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_and_escaped(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags and "<script" not in html and "<b>" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2  # a clip's and a reject's
    assert SCRIPT in page.text and "<b>news" in page.text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "Am Abend Regen." in page.text and "labels.tsv:7 bad1" in page.text


def test_page_needs_nothing_from_outside(html: str) -> None:
    page = Page(html)
    assert set(page.tags) & {"link", "iframe", "object", "embed", "base", "form"} == set()
    assert not re.search(r"https?:|url\(|@import", html)
    sources = [value or "" for _, name, value in page.attributes if name in ("src", "href")]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and name == "content" and value)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style and "prefers-color-scheme: dark" in style[1] and "style=" not in html
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"style-src 'sha256-{digest}'" in policy


def test_pictures(html: str) -> None:
    jpegs = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(jpegs) == 9
    for jpeg in jpegs:
        image = Image.open(io.BytesIO(base64.b64decode(jpeg)))
        assert image.format == "JPEG" and image.size == (96, 96)
        red, _, blue = image.getpixel((20, 5))
        assert red > blue + 80  # as drawn: the left half is red, so this is the picture, not grey or garbage
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]  # noqa: S314
    assert len(charts) == 5
    for chart in charts:
        bars = chart.findall("rect")
        assert sum(int(bar[0].text.split(": ")[-1]) for bar in bars) == 9
        assert all(0 <= float(bar.get("y")) <= 160 and float(bar.get("height")) >= 0 for bar in bars)


def test_what_a_killed_report_left_is_cleared(shards: Path) -> None:
    before = (shards / "report.html").read_bytes()
    (shards / "report.html.1.tmp").write_text("half of it")
    write_shard_report(shards)
    assert not list(shards.glob("*.tmp"))
    assert (shards / "report.html").read_bytes() == before


def test_a_clip_that_cannot_be_read_is_shown_as_such(shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = (shards / "report.html").read_bytes()
    write_shard_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before  # also without parts/
    (tmp_path / "test-000000.tar").unlink()
    assert main(["shards", "report", str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags["img"] == 6 and page.text.count("cannot be shown") == 3
    (tmp_path / "test.report.json").write_text("{}")
    with pytest.raises(InputError, match=r"test\.report\.json is not a report"):
        write_shard_report(tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "form", "same"),
    [
        ("Straße, 5 km!", "STRASSE 5km", normalised, True),
        ("ﬁne １２", "fine 12", normalised, True),
        ("5 °C", "5 C", normalised, False),
        ("नमक", "नमकी", normalised, False),  # vowel signs are no punctuation
        ("the man saw the dog", "The dog saw the man.", words, True),
        ("the man saw the dog", "the man saw a dog", words, False),
        ("今天 下雨。", "下雨今天", words, True),
        ("今天下雨", "明天下雨", words, False),
    ],
)
def test_forms_of_texts(one: str, other: str, form: type[str], same: bool) -> None:
    assert (form(one) == form(other)) is same


@pytest.mark.parametrize(
    ("text", "language", "foreign"),
    [
        ("Größe: 3 €, “ja” – naïve ½ ª", "de", ""),
        ("明天，下雨３度", "zh", ""),
        ("OK，明天ｖ", "zh-CN", "OKｖ"),
        ("こんにちは世界ラーメン々", "ja", ""),
        ("안녕", "en-US", "녕안"),
        ("any letter", "xx", ""),
        ("bell\x07 and \ufffd", "xx", "\x07\ufffd"),
        ("]^-\\ Я", "en", "Я"),
    ],
)
def test_characters_of_other_scripts(text: str, language: str, foreign: str) -> None:
    found = foreign_characters(["", text], [1], language, "clip {}".format)
    assert sorted(row["character"] for row in found["characters"]) == sorted(foreign)
    assert all(row["first"] == "clip 1" for row in found["characters"])
