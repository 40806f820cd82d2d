"""What is odd about a corpus without being a reason to reject anything: counts by name, for reports."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from sltscale.data.clips import SPLITS, Clip

SHORT, LONG = Fraction(1, 2), Fraction(60)  # seconds

_TEXTS = {
    "texts of several lines": re.compile(r"\n"),
    "texts with quotation marks": re.compile('"'),
    "texts with markup (tags or entities)": re.compile(r"<[^<>]+>|&(#[0-9]+|[A-Za-z]+);"),
    "texts with control characters": re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]"),
    "texts with bidirectional controls": re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"),
    "texts with unreadable characters (U+FFFD, private use)": re.compile("[\ufffd\ue000-\uf8ff]"),
}
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_NOTE = re.compile(r"\s*[\[(][^\[\]()]*[\])]\s*")


def corpus_notes(clips: Sequence[Clip]) -> dict[str, int]:
    """Counts by name: of ids, texts, spans, and of what splits share.

    An overlap is a clip that begins before the one before it ends, in order of start within a source video.
    """
    notes: Counter[str] = Counter()
    for clip in clips:
        _note_id(clip.id, notes)
        _note_text(clip.text, notes)
    _note_repeats(clips, notes)
    _note_spans(clips, notes)
    _note_images(clips, notes)
    return dict(notes)


def _note_id(id: str, notes: Counter[str]) -> None:
    notes["ids that begin with -"] += id[0] == "-"
    notes["ids with dots"] += "." in id
    notes["ids with colons"] += ":" in id
    notes["ids with slashes"] += "/" in id


def _note_text(text: str, notes: Counter[str]) -> None:
    for name, pattern in _TEXTS.items():
        notes[name] += pattern.search(text) is not None
    notes["texts without a letter or digit"] += _LETTER_OR_DIGIT.search(text) is None
    notes["texts that are only a note in brackets"] += _NOTE.fullmatch(text) is not None
    if not text.isascii():
        notes["texts with characters outside ASCII"] += 1
        notes["texts that NFKC normalisation changes"] += not unicodedata.is_normalized("NFKC", text)


def _note_repeats(clips: Sequence[Clip], notes: Counter[str]) -> None:
    texts: defaultdict[str, set[str]] = defaultdict(set)
    sources: defaultdict[str, set[Path]] = defaultdict(set)
    for clip in clips:
        notes[f"{clip.split}: clips that repeat an earlier text of the split"] += clip.text in texts[clip.split]
        texts[clip.split].add(clip.text)
        sources[clip.split].add(clip.path)
    for clip in clips:
        if clip.split != "train":
            notes[f"{clip.split}: clips whose text is also in train"] += clip.text in texts["train"]
    for one, other in itertools.combinations(SPLITS, 2):
        notes[f"source videos in both {one} and {other}"] += len(sources[one] & sources[other])


def _note_spans(clips: Sequence[Clip], notes: Counter[str]) -> None:
    videos: defaultdict[Path, list[tuple[float, float, str]]] = defaultdict(list)
    lengths: list[Fraction] = []
    for clip in clips:
        if clip.start is not None and clip.end is not None:
            lengths.append(clip.end - clip.start)
            # Equal decimals are equal floats, and floats sort many times faster than fractions.
            videos[clip.path].append((float(clip.start), float(clip.end), clip.text))
    if not lengths:
        return
    notes["shortest span in milliseconds"] = round(min(lengths) * 1000)
    notes["longest span in milliseconds"] = round(max(lengths) * 1000)
    notes["spans shorter than 0.5 s"] = sum(length < SHORT for length in lengths)
    notes["spans longer than 60 s"] = sum(length > LONG for length in lengths)
    for spans in videos.values():
        for earlier, later in itertools.pairwise(sorted(spans)):
            notes["overlapping spans"] += later[0] < earlier[1]
            notes["clips with the span and text of another"] += later == earlier


def _note_images(clips: Sequence[Clip], notes: Counter[str]) -> None:
    counts = [len(clip.images) for clip in clips if clip.images]
    if counts:
        notes["fewest images of a clip"] = min(counts)
        notes["most images of a clip"] = max(counts)
