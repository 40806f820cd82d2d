"""Corpora as their authors publish them: one reader each, from annotations and videos to Clip records.

A reader rejects single rows (with line and reason) and goes on; it raises InputError when the file as a whole is
unusable. To add a corpus, write its reader and put its name into CORPORA.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from sltscale.data.clips import Clip, Rejected
from sltscale.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".gif", ".avi")


class _BadRow(Exception):
    pass


def openasl(annotations: Path, videos: Path, *, language: str = "en") -> tuple[list[Clip], list[Rejected]]:
    """OpenASL's tab-separated file (arXiv 2205.12870): vid, yid, start, end, raw-text, tokenized-text, gloss, split.

    The video is VIDEOS/<yid> with one of VIDEO_SUFFIXES; the span is HH:MM:SS.mmm, or both times empty for the whole
    file; the text is ``raw-text``; split ``valid`` is dev. Fields may be quoted as pandas quotes them.
    InputError if the file cannot be used at all; a bad row is rejected.
    """
    columns = ("vid", "yid", "start", "end", "raw-text", "tokenized-text", "gloss", "split")
    lines = _lines(annotations)
    header = lines[0].split("\t")
    _check_columns(annotations, lines[0], header, columns)
    if len(lines) == 1:
        raise InputError(f"{annotations}: no rows after the header; expected one clip a line")
    files = _video_files(videos)
    splits = {"train": "train", "valid": "dev", "dev": "dev", "test": "test"}
    clips: list[Clip] = []
    rejected: list[Rejected] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = _fields(line)
        row = dict(zip(header, fields, strict=False))
        id, split = row.get("vid", ""), splits.get(row.get("split", ""), "")
        try:
            if len(fields) != len(header):
                raise _BadRow(f"{len(fields)} fields instead of {len(header)}")
            if not id.strip():
                raise _BadRow("empty id")
            if id in seen:
                raise _BadRow(f"id already used in line {seen[id]}")
            seen[id] = number
            if not split:
                raise _BadRow(f"unknown split {row['split']!r}")
            if not row["raw-text"].strip():
                raise _BadRow("empty text")
            start, end = _span(row["start"], row["end"])
            path = _source(row["yid"], videos, files)
        except _BadRow as error:
            rejected.append(Rejected(id, number, str(error), split))
            continue
        clips.append(Clip(id, path, start, end, row["raw-text"].strip(), language, split, number))
    return clips, rejected


Reader = Callable[..., tuple[list[Clip], list[Rejected]]]
CORPORA: dict[str, Reader] = {"openasl": openasl}


def read_corpus(name: str, annotations: Path, videos: Path, **options: Any) -> tuple[list[Clip], list[Rejected]]:
    """What the corpus reader of that name gives; InputError for an unknown name, with the nearest."""
    if name not in CORPORA:
        close = difflib.get_close_matches(name, CORPORA, n=1)
        raise InputError(f"unknown corpus {name!r}; " + (f"did you mean {close[0]}?" if close else _known(CORPORA)))
    return CORPORA[name](annotations, videos, **options)


def _known(names: Any) -> str:
    return f"known: {', '.join(names)}"


def _lines(path: Path) -> list[str]:
    """The file's lines without their ends; unlike str.splitlines, text may hold other separators (U+2028)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"annotation file {path}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"annotation file {path} is empty; expected a header and one clip a line")
    return lines


def _check_columns(path: Path, line: str, header: list[str], columns: tuple[str, ...]) -> None:
    missing = [column for column in columns if column not in header]
    if not missing:
        return
    if "\t" not in line:
        other = next((separator for separator in "|,;" if separator in line), None)
        found = f"columns separated by {other!r}" if other else f"a single column {line[:40]!r}"
        raise InputError(f"{path}: found {found} in its first line, expected tab-separated {', '.join(columns)}")
    close = difflib.get_close_matches(missing[0], header, n=1)
    hint = f"the nearest is {close[0]!r}" if close else f"found {', '.join(header)}"
    raise InputError(f"{path}: column {missing[0]!r} is missing; {hint}; expected {', '.join(columns)}")


def _fields(line: str) -> list[str]:
    """One line is one row, so that a stray quotation mark cannot swallow the rows that follow."""
    try:
        return next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return line.split("\t")


def _span(start: str, end: str) -> tuple[Fraction | None, Fraction | None]:
    if not start and not end:
        return None, None
    begin, stop = _seconds(start), _seconds(end)
    if stop <= begin:
        raise _BadRow(f"ends at {end}, not after its start at {start}")
    return begin, stop


def _seconds(text: str) -> Fraction:
    match = re.fullmatch(r"([0-9]{1,4}):([0-5][0-9]):([0-5][0-9](?:\.[0-9]{1,9})?)", text)
    if not match:
        raise _BadRow(f"unreadable time {text!r}")
    return 3600 * int(match[1]) + 60 * int(match[2]) + Fraction(match[3])


def _video_files(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise InputError(f"video folder {folder}: {error.strerror}") from None


def _source(video_id: str, folder: Path, files: set[str]) -> Path:
    """Ids are looked up among the folder's own names, so that none of them can lead outside it."""
    name = next((video_id + suffix for suffix in VIDEO_SUFFIXES if video_id + suffix in files), None)
    if name is None:
        raise _BadRow("video missing")
    return folder / name
