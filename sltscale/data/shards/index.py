"""The index of a split's shards: columns over its clips, mapped into memory, and reading clips by offset.

FOLDER/SPLIT.index.safetensors holds a column for each fact of a clip (docs/data.md lists them); strings are one block
of UTF-8 bytes and int64 offsets into it. Opening reads the header only, so a million clips cost no more than ten.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sltscale.data.shards.columns import COLUMNS, STRINGS, ColumnFile, write_columns
from sltscale.data.shards.features import MEMBER, Origin
from sltscale.data.shards.remote import shard_source
from sltscale.errors import InputError

SUFFIX = ".index.safetensors"
BLOCK = 512  # tar files count in blocks of this many bytes
MEMBERS = ("json", "mp4", "txt")  # of a clip, in the order in which they lie in the tar
FEATURE_MEMBERS = ("json", MEMBER, "txt")  # where its visual tokens are stored in place of its video


@dataclass(frozen=True)
class Row:
    """One packed clip. offset, size: its mp4 inside the tar; record: first byte and end of its members in the tar;
    crc32: of the tar records (header, content, padding) of each of MEMBERS; sha256 (hex): of the mp4; source: name of
    its source video or folder of images; resolution: width and height of that, upright, in pixels. Of features, a
    safetensors file stands in place of the mp4, and visual tokens in place of frames."""

    id: str
    key: str
    text: str
    language: str
    frames: int
    fps: tuple[int, int]
    offset: int
    size: int
    sha256: str
    record: tuple[int, int]
    crc32: tuple[int, int, int]
    source: str = ""
    signer: str = ""
    resolution: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Shard:
    """A finished tar: file name, bytes, sha256 (hex), its clips in order."""

    name: str
    bytes: int
    sha256: str
    rows: Sequence[Row]

    @property
    def seconds(self) -> float:
        """Length of its clips together."""
        return sum(row.frames * row.fps[1] / row.fps[0] for row in self.rows)


class Index:
    """Columns over the n clips of one split, in annotation order, as read-only numpy arrays.

    shard [n] (number into ``shards``), offset [n], size [n] (the mp4 inside the tar), frames [n], fps [n, 2]
    (numerator, denominator), resolution [n, 2] (width, height of the upright source), sha256 [n, 32] (of the mp4),
    record [n, 2] and crc32 [n, 3] (see Row). features: what they are made of, None of video; members: see MEMBERS.
    May be sent to other processes; they open files of their own.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    resolution: np.ndarray
    sha256: np.ndarray
    record: np.ndarray
    crc32: np.ndarray

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split, self.files = folder, split, shard_source(folder)
        self.path = self.files.local_copy(f"{split}{SUFFIX}")
        self._file = ColumnFile(self.path)
        self._columns, self._metadata = self._file.columns, self._file.metadata
        for name in COLUMNS:
            setattr(self, "_language" if name == "language" else name, self._columns[name])
        self.features = self._features()
        self.members = MEMBERS if self.features is None else FEATURE_MEMBERS
        self.corpus: str = self._metadata["corpus"]
        self.frame_size: int = self._metadata["frame_size"]
        self.shards: list[str] = [shard["name"] for shard in self._metadata["shards"]]
        self.shard_bytes: list[int] = [shard["bytes"] for shard in self._metadata["shards"]]
        self.shard_sha256: list[str] = [shard["sha256"] for shard in self._metadata["shards"]]

    def __reduce__(self) -> tuple[Callable[..., Index], tuple[str | Path, str]]:
        return Index, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self.frames)

    def id(self, clip: int) -> str:
        return self._string("id", clip)

    def key(self, clip: int) -> str:
        return self._string("key", clip)

    def text(self, clip: int) -> str:
        return self._string("text", clip)

    def language(self, clip: int) -> str:
        return str(self._metadata["languages"][self._columns["language"][clip]])

    def source(self, clip: int) -> str:
        return self._string("source", clip)

    def signer(self, clip: int) -> str:
        return self._string("signer", clip)

    def ids(self) -> list[str]:
        """The id of every clip."""
        return self._strings("id")

    def texts(self) -> list[str]:
        """The text of every clip."""
        return self._strings("text")

    def sources(self) -> list[str]:
        """The source of every clip."""
        return self._strings("source")

    def signers(self) -> list[str]:
        """The signer of every clip; empty where the corpus does not say."""
        return self._strings("signer")

    def languages(self) -> list[str]:
        """The languages that occur, each once, sorted."""
        return list(self._metadata["languages"])

    def clips_of(self, language: str) -> np.ndarray:
        """The numbers of the clips in that language, ascending."""
        return np.flatnonzero(self._columns["language"] == self.languages().index(language))

    @property
    def seconds(self) -> float:
        """Length of all clips together."""
        return float((self.frames * (self.fps[:, 1] / self.fps[:, 0])).sum())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the index file: the identity of these clips in this order."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def columns_intact(self) -> bool:
        """Whether the columns are those that were written (reads the whole index)."""
        return self._file.intact()

    def row(self, clip: int) -> dict[str, Any]:
        """Everything known of a clip, ready for json."""
        return {
            "split": self.split,
            "id": self.id(clip),
            "key": self.key(clip),
            "text": self.text(clip),
            "language": self.language(clip),
            "frames": int(self.frames[clip]),
            "fps": self.fps[clip].tolist(),
            "source": self.source(clip),
            "signer": self.signer(clip),
            "resolution": self.resolution[clip].tolist(),
            "shard": self.shards[self.shard[clip]],
            "offset": int(self.offset[clip]),
            "size": int(self.size[clip]),
            "sha256": self.sha256[clip].tobytes().hex(),
        }

    def video_bytes(self, clip: int) -> bytes:
        """The stored mp4 of a clip; InputError naming shard and clip if it is not the one that was indexed, or if there
        are features in its place."""
        if self.features is not None:
            raise InputError(f"{self.path} holds features, no video; give the shards that they are of")
        return self.clip_bytes(clip)

    def clip_bytes(self, clip: int) -> bytes:
        """The stored mp4 or features of a clip; InputError as from ``video_bytes``."""
        data = self.files.read(*self._range(clip))
        # 0.1 ms for a clip that takes tens to decode: damage never turns into silently different frames.
        if hashlib.sha256(data).digest() != self.sha256[clip].tobytes():
            raise InputError(f"{self.describe(clip)} is not the one in the index; see sltscale shards verify")
        return data

    def prefetch(self, clips: Iterable[int]) -> None:
        """Have these clips' bytes near at hand when they are read."""
        self.files.prefetch([self._range(clip) for clip in clips])

    def describe(self, clip: int) -> str:
        """A clip as messages name it: file, key and id."""
        file = self.files.address(self.shards[self.shard[clip]])
        return f"{file}: clip {self.key(clip)} (id {self.id(clip)})"

    def _features(self) -> Origin | None:
        facts = self._metadata.get("features")
        try:
            return None if facts is None else Origin.from_json(facts)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} does not say what its features are made of ({error!r})") from None

    def _range(self, clip: int) -> tuple[str, int, int]:
        return self.shards[self.shard[clip]], int(self.offset[clip]), int(self.size[clip])

    def _string(self, name: str, clip: int) -> str:
        begin, end = self._columns[f"{name}_offsets"][clip : clip + 2]
        return self._columns[name][begin:end].tobytes().decode()

    def _strings(self, name: str) -> list[str]:
        block, offsets = self._columns[name].tobytes(), self._columns[f"{name}_offsets"].tolist()
        return [block[begin:end].decode() for begin, end in pairwise(offsets)]


def splits(folder: str | Path) -> list[str]:
    """The splits that have an index in ``folder`` (or behind that URL); train, dev and test first."""
    order = {"train": 0, "dev": 1, "test": 2}
    names = [name.removesuffix(SUFFIX) for name in shard_source(folder).names(f"*{SUFFIX}")]
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def open_index(folder: str | Path, split: str) -> Index:
    """InputError if there is no such split (naming those that there are) or the index cannot be read."""
    found = splits(folder)
    if split in found:
        return Index(folder, split)
    if found:
        raise InputError(f"{folder} holds no split {split!r}; it has {', '.join(found)}")
    raise InputError(f"{folder} holds no index; expected a folder made by tools/make_shards.py")


def write_index(
    folder: Path, split: str, shards: Iterable[Shard], *, corpus: str, frame_size: int, features: Origin | None = None
) -> None:
    """Write the index of these (non-empty) shards, at once or not at all; the same shards give the same bytes.

    Each shard's rows become columns as it comes and may go then: a million clips take well under a gigabyte.
    """
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    blocks = {name: bytearray() for name in STRINGS}
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in STRINGS}
    codes: dict[str, int] = {}
    described = []
    for number, shard in enumerate(shards):
        described.append({"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256})
        rows = shard.rows
        values: dict[str, Any] = {
            "shard": np.full(len(rows), number),
            "language": [codes.setdefault(row.language, len(codes)) for row in rows],
            "sha256": np.frombuffer(bytes.fromhex("".join(row.sha256 for row in rows)), np.uint8).reshape(-1, 32),
        }
        values |= {name: [getattr(row, name) for row in rows] for name in COLUMNS.keys() - values}
        for name, (dtype, shape) in COLUMNS.items():
            pieces[name].append(np.asarray(values[name], dtype).reshape(-1, *shape))
        for name in STRINGS:
            strings = [getattr(row, name).encode() for row in rows]
            blocks[name] += b"".join(strings)
            lengths[name].append(np.array([len(string) for string in strings], np.int32))
    columns = {name: np.concatenate(pieces.pop(name)) for name in COLUMNS}
    for name in STRINGS:
        columns[name] = np.frombuffer(blocks[name], np.uint8)
        columns[f"{name}_offsets"] = np.concatenate([[0], *lengths.pop(name)]).cumsum(dtype=np.int64)
    languages = sorted(codes)
    places = [languages.index(language) for language in codes]
    columns["language"] = np.array(places, np.int16)[columns["language"]]
    metadata = {
        "corpus": corpus,
        "split": split,
        "frame_size": frame_size,
        "languages": languages,
        "shards": described,
    }
    if features is not None:
        metadata["features"] = features.to_json()
    write_columns(folder / f"{split}{SUFFIX}", columns, metadata)


def record_crc32(record: bytes, mp4: int, size: int) -> tuple[int, int, int]:
    """Checksums of the json, mp4 (or safetensors) and txt members in a clip's part of a tar.

    mp4: where the mp4's content of ``size`` bytes begins in ``record``; a header of one block stands before each
    member's content, and padding to whole blocks behind it.
    """
    view = memoryview(record)
    end = mp4 + padded(size)
    return zlib.crc32(view[: mp4 - BLOCK]), zlib.crc32(view[mp4 - BLOCK : end]), zlib.crc32(view[end:])


def padded(size: int) -> int:
    """Bytes that content of ``size`` bytes takes up in a tar."""
    return -(-size // BLOCK) * BLOCK
