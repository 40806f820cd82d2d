"""What every corpus reader shares: clips, rejects and notes as they come, and which split a file is of."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sltscale.data.annotations.notes import corpus_notes
from sltscale.data.annotations.tables import BadRow
from sltscale.data.clips import SPLITS, Clip, Rejected
from sltscale.errors import InputError

SPLIT_NAMES = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}


@dataclass(frozen=True)
class Corpus:
    """What a reader makes of a corpus. notes: what is no reason to reject but worth knowing, counted by name."""

    clips: list[Clip]
    rejected: list[Rejected]
    notes: dict[str, int] = field(default_factory=dict)


class Reading:
    """Clips, rejects and notes as they come; ids are unique over all files."""

    def __init__(self) -> None:
        self.clips: list[Clip] = []
        self.rejected: list[Rejected] = []
        self.notes: Counter[str] = Counter()
        self._seen: dict[str, tuple[str, int]] = {}

    @contextlib.contextmanager
    def row(self, file: Path, line: int, id: str, split: str) -> Iterator[None]:
        """A BadRow raised inside becomes a reject."""
        try:
            yield
        except BadRow as error:
            self.rejected.append(Rejected(_printable(id), line, _printable(str(error)), split, file.name))

    def add(self, clip: Clip, file: Path) -> None:
        """BadRow if its id is empty or taken, its text is empty, or a string cannot be written as UTF-8."""
        if not clip.id.strip():
            raise BadRow("empty id")
        if not clip.text.strip():
            raise BadRow("empty text")
        if clip.id in self._seen:
            name, line = self._seen[clip.id]
            raise BadRow(f"id already used in line {line}" + (f" of {name}" if name != file.name else ""))
        try:
            f"{clip.id}{clip.text}{clip.signer}{clip.path.name}".encode()
        except UnicodeEncodeError:
            raise BadRow("half of a surrogate pair in its id, text, signer or file") from None
        self._seen[clip.id] = (file.name, clip.line)
        self.clips.append(replace(clip, file=file.name))

    def corpus(self) -> Corpus:
        notes = corpus_notes(self.clips) | self.notes
        return Corpus(self.clips, self.rejected, {name: count for name, count in notes.items() if count})


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def file_split(path: Path, split: str | None) -> str:
    """The one split that the file's name tells, otherwise ``split``; InputError if neither does."""
    words = re.split(r"[^a-z]+", path.name.lower())
    told = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    if len(told) == 1:
        return told.pop()
    if split is None:
        raise InputError(f"{path}: neither its name nor its rows tell the split; give --split {', '.join(SPLITS)}")
    return split
