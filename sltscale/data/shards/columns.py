"""The index file: columns in the safetensors format, mapped when read, written and checked piece by piece.

A million clips are some 300 MB of columns. So nothing here copies them: writing goes column by column, checking reads
through a small buffer and not through the map (whose pages would count as this process's memory).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sltscale.errors import InputError

FORMAT = 2
COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "shard": ("int32", ()),
    "offset": ("int64", ()),
    "size": ("int64", ()),
    "frames": ("int32", ()),
    "fps": ("int32", (2,)),
    "resolution": ("int32", (2,)),
    "sha256": ("uint8", (32,)),
    "record": ("int64", (2,)),
    "crc32": ("uint32", (3,)),
    "language": ("int16", ()),
}
STRINGS = ("id", "key", "text", "source", "signer")

_METADATA_KEY = "sltscale"
_TYPES = {"int64": "I64", "int32": "I32", "int16": "I16", "uint32": "U32", "uint8": "U8"}
_CHUNK = 1 << 20


class ColumnFile:
    """An index file, open. columns: read-only views of the mapped file. metadata: the JSON object stored with them.

    InputError if it cannot be read, has another format, or its columns do not fit each other.
    """

    columns: dict[str, np.ndarray]
    metadata: dict[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            begin = 8 + int.from_bytes(mapped[:8], "little")
            header = json.loads(mapped[8:begin])
            self.metadata = json.loads(header.pop("__metadata__")[_METADATA_KEY])
            if self.metadata["format"] != FORMAT:
                raise InputError(
                    f"{path}: index format {self.metadata['format']}, this version reads {FORMAT}; pack again"
                )
            self._places = {name: tuple(begin + at for at in entry["data_offsets"]) for name, entry in header.items()}
            self.columns = {name: _column(mapped, begin, entry) for name, entry in header.items()}
            _check_shapes(self.columns)
            if any(Path(shard["name"]).name != shard["name"] for shard in self.metadata["shards"]):
                raise ValueError("a shard name is a path")
            _check_values(self.columns, self.metadata)
        except OSError as error:
            raise InputError(f"index {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not an index or is damaged ({error}); pack again") from None

    def intact(self) -> bool:
        """Whether the columns are those that were written; reads the whole file."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for name in sorted(self._places):
                begin, end = self._places[name]
                file.seek(begin)
                while begin < end and (chunk := file.read(min(_CHUNK, end - begin))):
                    digest.update(chunk)
                    begin += len(chunk)
        return digest.hexdigest() == self.metadata["columns_sha256"]


def write_columns(path: Path, columns: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write an index file at once or not at all; ``metadata`` gains the format and the checksum of the columns.

    By hand, because the library's writer holds all columns twice and hides a full disk behind errors of its own.
    """
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).data)
    stored = {**metadata, "format": FORMAT, "columns_sha256": digest.hexdigest()}
    # Wide types first, so that every column begins at a multiple of its item size.
    order = sorted(columns, key=lambda name: (-columns[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: json.dumps(stored, sort_keys=True)}}
    end = 0
    for name in order:
        begin, end = end, end + columns[name].nbytes
        dtype, shape = _TYPES[columns[name].dtype.name], list(columns[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in order:
                file.write(np.ascontiguousarray(columns[name]).data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _column(mapped: mmap.mmap, begin: int, entry: dict[str, Any]) -> np.ndarray:
    first, end = entry["data_offsets"]
    dtype = np.dtype({code: name for name, code in _TYPES.items()}[entry["dtype"]])
    column = np.frombuffer(mapped, dtype, (end - first) // dtype.itemsize, begin + first)
    return column.reshape(entry["shape"])


def _check_shapes(columns: dict[str, np.ndarray]) -> None:
    clips = len(columns["frames"])
    for name, (dtype, shape) in COLUMNS.items():
        if columns[name].dtype != dtype or columns[name].shape != (clips, *shape):
            raise ValueError(f"column {name} is {columns[name].dtype} {columns[name].shape}")
    for name in STRINGS:
        offsets = columns[f"{name}_offsets"]
        if offsets.shape != (clips + 1,) or offsets[-1] != len(columns[name]):
            raise ValueError(f"column {name} does not fit its offsets")


def _check_values(columns: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """What a reader would stumble over: an index may come from anywhere, and its checksum with it."""
    shards = metadata["shards"]
    if not isinstance(metadata["corpus"], str) or not isinstance(metadata["frame_size"], int):
        raise ValueError("it does not say its corpus and frame size")
    if not all(isinstance(shard["name"], str) and isinstance(shard["bytes"], int) for shard in shards):
        raise ValueError("a shard without name or size")
    for name, end in {"shard": len(shards), "language": len(metadata["languages"])}.items():
        if len(columns[name]) and not 0 <= columns[name].min() <= columns[name].max() < end:
            raise ValueError(f"column {name} has numbers outside 0 to {end - 1}")
    for name in ("frames", "fps"):
        if len(columns[name]) and columns[name].min() < 1:
            raise ValueError(f"column {name} has numbers below 1")
