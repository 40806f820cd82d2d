"""The index of a split's shards: one safetensors file of columns, mapped into memory, and reading clips by offset.

FOLDER/SPLIT.index.safetensors holds a column for each fact of a clip (docs/data.md lists them); strings are one block
of UTF-8 bytes and int64 offsets into it. Opening reads the header only, so a million clips cost no more than ten.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from sltscale.errors import InputError
from sltscale.files import write_atomically

FORMAT = 1
SUFFIX = ".index.safetensors"
METADATA_KEY = "sltscale"
OPEN_SHARDS = 64
BLOCK = 512  # tar files count in blocks of this many bytes
MEMBERS = ("json", "mp4", "txt")  # of a clip, in the order in which they lie in the tar

_COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "shard": ("int32", ()),
    "offset": ("int64", ()),
    "size": ("int64", ()),
    "frames": ("int32", ()),
    "fps": ("int32", (2,)),
    "sha256": ("uint8", (32,)),
    "record": ("int64", (2,)),
    "crc32": ("uint32", (3,)),
    "language": ("int16", ()),
}
_STRINGS = ("id", "key", "text")
_TYPES = {"I64": "int64", "I32": "int32", "I16": "int16", "U32": "uint32", "U8": "uint8"}


@dataclass(frozen=True)
class Row:
    """One packed clip. offset, size: its mp4 inside the tar; record: first byte and end of its members in the tar;
    crc32: of the tar records (header, content, padding) of each of MEMBERS; sha256 (hex): of the mp4."""

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


@dataclass(frozen=True)
class Shard:
    """A finished tar: file name, bytes, sha256 (hex), its clips in order."""

    name: str
    bytes: int
    sha256: str
    rows: Sequence[Row]


class Index:
    """Columns over the n clips of one split, in annotation order, as read-only numpy arrays.

    shard [n] (number into ``shards``), offset [n], size [n] (the mp4 inside the tar), frames [n], fps [n, 2]
    (numerator, denominator), sha256 [n, 32] (of the mp4), record [n, 2] and crc32 [n, 3] (see Row).
    May be sent to other processes; they open files of their own.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    sha256: np.ndarray
    record: np.ndarray
    crc32: np.ndarray

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split, self.path = Path(folder), split, Path(folder) / f"{split}{SUFFIX}"
        self._columns, self._metadata = _map_columns(self.path)
        for name in _COLUMNS:
            setattr(self, "_language" if name == "language" else name, self._columns[name])
        self.corpus: str = self._metadata["corpus"]
        self.frame_size: int = self._metadata["frame_size"]
        self.shards: list[str] = [shard["name"] for shard in self._metadata["shards"]]
        self.shard_bytes: list[int] = [shard["bytes"] for shard in self._metadata["shards"]]
        self.shard_sha256: list[str] = [shard["sha256"] for shard in self._metadata["shards"]]
        self._open: OrderedDict[int, _ShardFile] = OrderedDict()

    def __reduce__(self) -> tuple[Callable[..., Index], tuple[Path, str]]:
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

    def texts(self) -> list[str]:
        return [self.text(clip) for clip in range(len(self))]

    @property
    def seconds(self) -> float:
        """Length of all clips together."""
        return float((self.frames * (self.fps[:, 1] / self.fps[:, 0])).sum())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the index file: the identity of these clips in this order."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def columns_intact(self) -> bool:
        """Whether the columns are those that were written (reads the whole index)."""
        return _columns_sha256(self._columns) == self._metadata["columns_sha256"]

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
            "shard": self.shards[self.shard[clip]],
            "offset": int(self.offset[clip]),
            "size": int(self.size[clip]),
            "sha256": self.sha256[clip].tobytes().hex(),
        }

    def video_bytes(self, clip: int) -> bytes:
        """The stored mp4 of a clip; InputError naming shard and clip if it is not the one that was indexed."""
        number = int(self.shard[clip])
        data = self._shard_file(number).read(int(self.offset[clip]), int(self.size[clip]))
        # 0.1 ms for a clip that takes tens to decode: damage never turns into silently different frames.
        if hashlib.sha256(data).digest() != self.sha256[clip].tobytes():
            raise InputError(
                f"{self.folder / self.shards[number]}: clip {self.key(clip)} (id {self.id(clip)}) is not the one "
                "in the index; see sltscale shards verify"
            )
        return data

    def _string(self, name: str, clip: int) -> str:
        begin, end = self._columns[f"{name}_offsets"][clip : clip + 2]
        return self._columns[name][begin:end].tobytes().decode()

    def _shard_file(self, number: int) -> _ShardFile:
        file = self._open.pop(number, None) or _ShardFile(self.folder / self.shards[number])
        self._open[number] = file
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return file


class _ShardFile:
    """Positioned reads share no file offset, so forked processes and threads may use the same descriptor."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"shard {path}: {error.strerror}; see sltscale shards verify") from None

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(self.descriptor, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def splits(folder: Path) -> list[str]:
    """The splits that have an index in ``folder``; train, dev and test first."""
    order = {"train": 0, "dev": 1, "test": 2}
    names = [path.name.removesuffix(SUFFIX) for path in Path(folder).glob(f"*{SUFFIX}")]
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def open_index(folder: Path, split: str) -> Index:
    """InputError if there is no such split (naming those that there are) or the index cannot be read."""
    found = splits(folder)
    if split in found:
        return Index(Path(folder), split)
    if found:
        raise InputError(f"{folder} holds no split {split!r}; it has {', '.join(found)}")
    raise InputError(f"{folder} holds no index; expected a folder made by tools/make_shards.py")


def write_index(folder: Path, split: str, shards: Sequence[Shard], *, corpus: str, frame_size: int) -> None:
    """Write the index of these (non-empty) shards, at once or not at all; the same shards give the same bytes."""
    rows = [row for shard in shards for row in shard.rows]
    languages = sorted({row.language for row in rows})
    codes = {language: code for code, language in enumerate(languages)}
    values: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in ("offset", "size", "frames")}
    values |= {name: [getattr(row, name) for row in rows] for name in ("fps", "record", "crc32")}
    values["shard"] = [number for number, shard in enumerate(shards) for _ in shard.rows]
    values["language"] = [codes[row.language] for row in rows]
    columns = {name: np.array(column, _COLUMNS[name][0]) for name, column in values.items()}
    columns["sha256"] = np.frombuffer(b"".join(bytes.fromhex(row.sha256) for row in rows), np.uint8).reshape(-1, 32)
    for name in _STRINGS:
        strings = [getattr(row, name).encode() for row in rows]
        columns[name] = np.frombuffer(b"".join(strings), np.uint8)
        columns[f"{name}_offsets"] = np.cumsum([0, *map(len, strings)], dtype=np.int64)
    metadata = {
        "format": FORMAT,
        "corpus": corpus,
        "split": split,
        "frame_size": frame_size,
        "languages": languages,
        "shards": [{"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256} for shard in shards],
        "columns_sha256": _columns_sha256(columns),
    }
    # A single key: the order of several would change between runs.
    content = save(columns, metadata={METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    write_atomically(folder / f"{split}{SUFFIX}", content)


def record_crc32(record: bytes, mp4: int, size: int) -> tuple[int, int, int]:
    """Checksums of the json, mp4 and txt members in a clip's part of a tar.

    mp4: where the mp4's content of ``size`` bytes begins in ``record``; a header of one block stands before each
    member's content, and padding to whole blocks behind it.
    """
    view = memoryview(record)
    end = mp4 + padded(size)
    return zlib.crc32(view[: mp4 - BLOCK]), zlib.crc32(view[mp4 - BLOCK : end]), zlib.crc32(view[end:])


def padded(size: int) -> int:
    """Bytes that content of ``size`` bytes takes up in a tar."""
    return -(-size // BLOCK) * BLOCK


def _map_columns(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns as views of the mapped file. The library's own reader copies each tensor into memory."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:begin])
        metadata = json.loads(header.pop("__metadata__")[METADATA_KEY])
        if metadata["format"] != FORMAT:
            raise InputError(f"{path}: index format {metadata['format']}, this version reads {FORMAT}; pack again")
        columns = {name: _column(mapped, begin, entry) for name, entry in header.items()}
        _check_shapes(columns)
        if any(Path(shard["name"]).name != shard["name"] for shard in metadata["shards"]):
            raise ValueError("a shard name is a path")
    except OSError as error:
        raise InputError(f"index {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not an index or is damaged ({error}); pack again") from None
    return columns, metadata


def _column(mapped: mmap.mmap, begin: int, entry: dict[str, Any]) -> np.ndarray:
    first, end = entry["data_offsets"]
    dtype = np.dtype(_TYPES[entry["dtype"]])
    column = np.frombuffer(mapped, dtype, (end - first) // dtype.itemsize, begin + first)
    return column.reshape(entry["shape"])


def _check_shapes(columns: dict[str, np.ndarray]) -> None:
    clips = len(columns["frames"])
    for name, (dtype, shape) in _COLUMNS.items():
        if columns[name].dtype != dtype or columns[name].shape != (clips, *shape):
            raise ValueError(f"column {name} is {columns[name].dtype} {columns[name].shape}")
    for name in _STRINGS:
        offsets = columns[f"{name}_offsets"]
        if offsets.shape != (clips + 1,) or offsets[-1] != len(columns[name]):
            raise ValueError(f"column {name} does not fit its offsets")


def _columns_sha256(columns: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(columns[name].tobytes())
    return digest.hexdigest()
