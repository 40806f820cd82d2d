"""OUT/parts, the work under way on a split: its settings, its finished shards, and who is packing which of them.

Several processes, also on several machines with one file system, may pack shards of one split at once; each holds a
byte of the lock file for every shard that is its own. Such locks end with their process, however it ends. Whoever holds
a shard is the only one to write its tar and its record or to delete what is left of an interrupted write.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sltscale.data.clips import SPLITS, Rejected
from sltscale.data.shards.index import Row, Shard
from sltscale.data.shards.index import splits as packed_splits
from sltscale.errors import InputError
from sltscale.files import write_atomically

FOLDER = "parts"
_TUPLES = ("fps", "record", "crc32", "resolution")


@dataclass(frozen=True)
class Part:
    """A finished shard (with no rows, and no tar, if all its clips were rejected)."""

    shard: Shard
    rejected: list[Rejected]


@dataclass(frozen=True)
class Parts:
    """The parts of one split in ``out``, one for each shard number."""

    out: Path
    split: str

    @property
    def folder(self) -> Path:
        return self.out / FOLDER

    def tar(self, number: int) -> Path:
        return self.out / f"{self.split}-{number:06d}.tar"

    def settings(self) -> dict[str, Any]:
        return self._content("settings")

    def count(self) -> int:
        """How many shards the split has, finished or not."""
        settings = self.settings()
        return -(-settings["clips"] // settings["clips_per_shard"])

    def reader(self) -> tuple[list[Rejected], dict[str, int]]:
        """The rows that the corpus reader rejected, and its notes."""
        content = self._content("reader")
        return [Rejected(**row) for row in content["rejected"]], content["notes"]

    def tasks(self) -> int | None:
        """How many tasks the last array had that packed here; None if there was none."""
        try:
            return int((self.folder / f"{self.split}.tasks").read_text())
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def held(self, numbers: Collection[int] | None) -> Iterator[None]:
        """Hold these shards (None: the whole split) for this process, and clear what a killed one left of them.

        InputError if another process holds one of them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.split}.lock").open("a+b") as file:
            try:
                if numbers is None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for number in numbers or ():
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except (BlockingIOError, PermissionError):
                raise InputError(
                    f"{self.out}: another process is packing split {self.split} here; wait for it or kill it"
                ) from None
            self._clear(numbers)
            yield

    def begin(
        self, settings: dict[str, Any], rejected: Sequence[Rejected], notes: dict[str, int], tasks: int | None
    ) -> None:
        """Write down what the split is packed from, or InputError if it was begun from something else."""
        # A file of its own: closing a file ends all locks that this process has on it.
        with (self.folder / f"{self.split}.settings.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            for scratch in self.folder.glob(f"{self.split}.*.tmp"):
                scratch.unlink()
            path = self.folder / f"{self.split}.settings.json"
            if path.exists():
                self._check_same(json.loads(json.dumps(settings)))
            elif self.split in packed_splits(self.out):
                raise InputError(
                    f"{self.out}: already holds split {self.split}, without parts/; choose another folder or delete it"
                )
            reader = {"rejected": [asdict(row) for row in rejected], "notes": notes}
            write_atomically(self.folder / f"{self.split}.reader.json", json.dumps(reader, ensure_ascii=False))
            if tasks is not None:
                write_atomically(self.folder / f"{self.split}.tasks", str(tasks))
            if not path.exists():
                write_atomically(path, json.dumps(settings, indent=1, sort_keys=True))

    def read(self, number: int) -> Part | None:
        """None if that shard is not finished, its record is unreadable, or its tar is gone or has another size."""
        path = self._record(number)
        if not path.exists():
            return None
        try:
            part = json.loads(path.read_bytes())
            rows = [Row(**(row | {name: tuple(row[name]) for name in _TUPLES})) for row in part["shard"]["rows"]]
            shard = Shard(**(part["shard"] | {"rows": rows}))
        except (ValueError, KeyError, TypeError):
            return None
        tar = self.out / shard.name
        if rows and not (tar.is_file() and tar.stat().st_size == shard.bytes):
            return None
        return Part(shard, [Rejected(**rejected) for rejected in part["rejected"]])

    def recorded(self, number: int) -> bool:
        """Whether shard ``number`` was finished once; ``read`` looks closer."""
        return self._record(number).exists()

    def write(self, number: int, part: Part) -> None:
        """The sign that shard ``number`` is finished; its tar must be."""
        write_atomically(self._record(number), json.dumps(asdict(part), ensure_ascii=False))

    def _content(self, what: str) -> dict[str, Any]:
        path = self.folder / f"{self.split}.{what}.json"
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} cannot be read ({error}); restore it, or delete {self.out} and pack again"
            ) from None

    def _record(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:06d}.json"

    def _clear(self, numbers: Collection[int] | None) -> None:
        name = re.compile(rf"{self.split}-([0-9]+)\.(?:tar|json)\..*tmp")
        for path in (*self.out.glob(f"{self.split}-*tmp"), *self.folder.glob(f"{self.split}-*tmp")):
            match = name.fullmatch(path.name)
            if match and (numbers is None or int(match[1]) in numbers):
                path.unlink()
        if numbers is None:
            for path in self.out.glob(f"{self.split}.*.tmp"):
                path.unlink()

    def _check_same(self, settings: dict[str, Any]) -> None:
        begun, now = ({**s, **s.get("features", {})} for s in (self.settings(), settings))
        if begun == now:
            return
        name = next(n for n in sorted((now.keys() | begun.keys()) - {"features"}) if now.get(n) != begun.get(n))
        difference = f"with {name} {begun.get(name)!r}, now {now.get(name)!r}"
        if name in ("clips", "clips_sha256"):
            difference = "from other annotations or videos"
        raise InputError(f"{self.out}: split {self.split} was begun {difference}; choose another folder or delete it")


def begun_splits(out: Path) -> list[str]:
    """The splits that were begun in ``out``, in the order of SPLITS."""
    return [split for split in SPLITS if (Path(out) / FOLDER / f"{split}.settings.json").exists()]
