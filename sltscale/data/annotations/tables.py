"""Annotations in text files: separated columns or JSON lines, one row a line, and the times in them."""

from __future__ import annotations

import csv
import difflib
import json
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from sltscale.errors import InputError

MAX_BYTES = 1 << 30  # of an annotation file


class BadRow(Exception):
    """One row cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """One row. fault: why its values cannot be trusted (empty = they can); indexing then raises BadRow."""

    line: int
    values: dict[str, str]
    fault: str = ""

    def __getitem__(self, column: str) -> str:
        if self.fault:
            raise BadRow(self.fault)
        return self.values[column]

    def get(self, column: str) -> str:
        """The value, empty if the row or the table does not have it."""
        return self.values.get(column, "")


def read_rows(path: Path, columns: Sequence[str], separator: str = "\t") -> Iterator[Row]:
    """The rows below a header that holds ``columns`` (and maybe more), empty lines left out.

    Fields may be quoted as pandas and spreadsheets do. InputError if the file cannot be used as a whole.
    """
    lines = read_lines(path)
    header = lines[0].split(separator)
    _check_columns(path, lines[0], header, columns, separator)
    if len(lines) == 1:
        raise InputError(f"{path}: no rows after the header; expected one clip a line")
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        fields = _fields(line, separator)
        fault = "" if len(fields) == len(header) else f"{len(fields)} fields instead of {len(header)}"
        yield Row(number, dict(zip(header, fields, strict=False)), fault)


def read_json_rows(path: Path, required: Sequence[str]) -> Iterator[Row]:
    """One JSON object a line, its values text, numbers (kept as they are written), null or lists of whole numbers
    (joined by commas). InputError if the file cannot be used as a whole.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if line:
            yield _json_row(number, line, required)


def _json_row(number: int, line: str, required: Sequence[str]) -> Row:
    try:
        # 0.1 as a float would be another number.
        content = json.loads(line, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, f"not JSON ({error})")
    if not isinstance(content, dict):
        return Row(number, {}, "not a JSON object")
    values: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, list) and all(isinstance(part, str) and part.isdecimal() for part in value):
            value = ",".join(value)
        if not isinstance(value, str | None):
            return Row(number, values, f"{name!r} is neither text nor a number")
        values[name] = value or ""
    missing = next((name for name in required if name not in values), None)
    return Row(number, values, f"{missing!r} is missing" if missing else "")


def read_lines(path: Path) -> list[str]:
    """The lines of an annotation file, as ``text_lines`` gives them; InputError if it cannot be used."""
    try:
        return text_lines(path)
    except BadRow as error:
        raise InputError(f"annotation file {path}: {error}") from None


def text_lines(path: Path) -> list[str]:
    """The file's lines without their ends; unlike str.splitlines, text may hold other separators (U+2028).

    BadRow as check_file, and if the file cannot be read, is empty or is not UTF-8.
    """
    try:
        check_file(path)
        content = path.read_bytes()
    except OSError as error:
        raise BadRow(error.strerror) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadRow(f"line {line}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not any(line.strip() for line in lines):
        raise BadRow("it is empty")
    return lines


def check_file(path: Path) -> None:
    """BadRow if the file has more than MAX_BYTES or is not a regular one: a pipe or device may never end."""
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise BadRow("not a regular file")
    if facts.st_size > MAX_BYTES:
        raise BadRow(f"{facts.st_size} bytes, expected at most {MAX_BYTES}; split the file")


def _check_columns(path: Path, line: str, header: list[str], columns: Sequence[str], separator: str) -> None:
    twice = next((column for column in header if header.count(column) > 1), "")
    if twice:
        raise InputError(f"{path}: column {twice!r} is there twice; expected {', '.join(columns)} once each")
    missing = [column for column in columns if column not in header]
    if not missing:
        return
    if separator not in line:
        other = next((other for other in "\t|,;" if other in line), None)
        found = f"columns separated by {other!r}" if other else f"a single column {line[:40]!r}"
        raise InputError(
            f"{path}: found {found} in its first line, expected {', '.join(columns)} separated by {separator!r}"
        )
    close = difflib.get_close_matches(missing[0], header, n=1)
    hint = f"the nearest is {close[0]!r}" if close else f"found {', '.join(header)[:200]}"
    raise InputError(f"{path}: column {missing[0]!r} is missing; {hint}; expected {', '.join(columns)}")


def _fields(line: str, separator: str) -> list[str]:
    """One line is one row, so that a stray quotation mark cannot swallow the rows that follow."""
    try:
        return next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        return line.split(separator)


def seconds(text: str) -> Fraction:
    """Exact seconds of ``HH:MM:SS.mmm`` or of a plain decimal number; BadRow for anything else (nan, 1e3, -1)."""
    clock = re.fullmatch(r"([0-9]{1,4}):([0-5][0-9]):([0-5][0-9](?:\.[0-9]{1,18})?)", text)
    if clock:
        return 3600 * int(clock[1]) + 60 * int(clock[2]) + Fraction(clock[3])
    if not re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,18})?", text):
        raise BadRow(f"unreadable time {text[:40]!r}")
    return Fraction(text)


def span(start: str, end: str) -> tuple[Fraction, Fraction]:
    """Two times of which the second is the later; BadRow otherwise."""
    begin, stop = seconds(start), seconds(end)
    if stop <= begin:
        raise BadRow(f"ends at {end}, not after its start at {start}")
    return begin, stop
