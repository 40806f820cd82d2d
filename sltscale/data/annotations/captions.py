"""Captions of a video, WebVTT (https://www.w3.org/TR/webvtt1/) or SubRip (.srt): cues with exact times and raw text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sltscale.data.annotations.tables import BadRow, text_lines

SUFFIXES = (".vtt", ".srt")

_TIME = r"(?:([0-9]{1,4}):)?([0-5][0-9]):([0-5][0-9])[.,]([0-9]{3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_NO_CUE = re.compile(r"(NOTE|STYLE|REGION)(\s.*)?")


@dataclass(frozen=True, slots=True)
class Cue:
    """One caption. number: from 1, in the file's order. line: of its times. start, end: milliseconds. text: as in the
    file, markup and entities included, lines joined by a line feed. fault: why it cannot be used (empty = it can)."""

    number: int
    line: int
    start: int
    end: int
    text: str
    fault: str = ""


def read_cues(path: Path) -> Iterator[Cue]:
    """The cues of a caption file, usable or not, in its order; notes, styles, regions and cue names are left out.

    BadRow if it cannot be read, is not UTF-8, or is not WebVTT though its name says so.
    """
    lines = text_lines(path)
    webvtt = path.suffix.lower() == ".vtt"
    if webvtt and not re.fullmatch(r"WEBVTT([ \t].*)?", lines[0]):
        raise BadRow(f"not WebVTT: begins with {lines[0][:40]!r}, expected 'WEBVTT'")
    number = 0
    for first, block in _blocks(lines, webvtt):
        timing = next((i for i, line in enumerate(block) if "-->" in line), None)
        if timing is None and webvtt and (first == 1 or _NO_CUE.fullmatch(block[0])):
            continue
        number += 1
        yield _cue(number, first, block, timing)


def _blocks(lines: list[str], webvtt: bool) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines between empty ones, each with the number of its first. A line of spaces is text in WebVTT."""
    block: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line if webvtt else line.strip():
            block.append(line)
        elif block:
            yield number - len(block), block
            block = []


def _cue(number: int, first: int, block: list[str], timing: int | None) -> Cue:
    if timing is None:
        return Cue(number, first, 0, 0, "\n".join(block), f"no times before the text {block[0][:40]!r}")
    line, text = first + timing, block[timing + 1 :]
    match = _TIMING.fullmatch(block[timing])
    if match is None:
        return Cue(number, line, 0, 0, "\n".join(text), f"unreadable times {block[timing][:60]!r}")
    merged = next((i for i, other in enumerate(text, start=1) if "-->" in other), None)
    fault = f"no empty line before the times in line {line + merged}" if merged else ""
    hours, minutes, seconds, thousandths, *rest = (int(part or 0) for part in match.groups())
    start = ((hours * 60 + minutes) * 60 + seconds) * 1000 + thousandths
    hours, minutes, seconds, thousandths = rest
    end = ((hours * 60 + minutes) * 60 + seconds) * 1000 + thousandths
    return Cue(number, line, start, end, "\n".join(text), fault)
