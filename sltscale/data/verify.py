"""Are the shards the ones that were indexed? Names the first clip that differs in each damaged shard.

The whole of every tar is compared (its sha256), so a flipped bit in a tar header or in padding is found too; the
checksums of each clip's members then say where. ``check_shards`` does this before training, shared among the ranks,
and remembers what it has seen by size and modification time; ``verify`` reads everything every time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sltscale import parallel
from sltscale.data.index import BLOCK, MEMBERS, Index, record_crc32
from sltscale.errors import InputError
from sltscale.files import write_atomically

CACHE = ".verified.json"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Defect:
    """shard: file name. key, id: the first clip that differs (empty if no clip does)."""

    shard: str
    key: str
    id: str
    reason: str

    def __str__(self) -> str:
        where = f", clip {self.key} (id {self.id})" if self.key else ""
        return f"{self.shard}{where}: {self.reason}"


def verify(index: Index) -> list[Defect]:
    """At most one Defect per shard, and one for the index itself."""
    if not index.columns_intact():
        return [_index_defect(index)]
    return [defect for number in range(len(index.shards)) if (defect := _compare(index, number))]


def check_shards(index: Index, rank: int, world_size: int) -> None:
    """Before the first step: raise InputError, the same on all ranks, if a shard does not match its index.

    Every rank reads its part of the shards. Shards that were verified before and have kept size and modification time
    are not read again; this is remembered in FOLDER/.verified.json where that can be written.
    """
    known = _read_cache(index.folder)
    defects, verified = [], {}
    mine = range(rank, len(index.shards), world_size)
    if not index.columns_intact():
        defects, mine = [_index_defect(index)], range(0)
    for number in mine:
        name = index.shards[number]
        before = _stamp(index, number)
        if before is not None and known.get(name) == before:
            continue
        defect = _compare(index, number)
        if defect:
            defects.append(defect)
        elif before is not None:
            verified[name] = before
    found = parallel.gather_objects((defects, verified))
    if rank == 0:
        _write_cache(index.folder, known, [part for _, part in found])
    every = sorted({defect for part, _ in found for defect in part}, key=lambda defect: defect.shard)
    if every:
        more = f" (and {len(every) - 1} more)" if len(every) > 1 else ""
        raise InputError(f"{index.folder}: {every[0]}{more}; run sltscale shards verify, restore or pack again")


def _index_defect(index: Index) -> Defect:
    return Defect(index.path.name, "", "", "the index itself is damaged: its columns do not match their checksum")


def _compare_size(index: Index, number: int) -> Defect | None:
    name, expected = index.shards[number], index.shard_bytes[number]
    clips = _clips(index, number)
    try:
        size = (index.folder / name).stat().st_size
    except OSError as error:
        return _defect(index, name, clips[0], f"cannot be read: {error.strerror}")
    if size == expected:
        return None
    cut = clips[index.record[clips, 1] > size]
    clip = cut[0] if len(cut) else None
    return _defect(index, name, clip, f"has {size} bytes instead of {expected}")


def _compare(index: Index, number: int) -> Defect | None:
    name, clips = index.shards[number], _clips(index, number)
    wrong_size = _compare_size(index, number)
    try:
        with (index.folder / name).open("rb") as file:
            head = file.read(BLOCK)
            file.seek(0)
            digest = hashlib.sha256()
            first = _first_different(index, clips, file, digest)
            for chunk in iter(lambda: file.read(CHUNK), b""):
                digest.update(chunk)
    except OSError as error:
        return wrong_size or _defect(index, name, clips[0], f"cannot be read: {error.strerror}")
    if first is not None:
        clip, reason = first
        notes = "" if head[257:262] == b"ustar" else "not a tar file; "
        notes += f"{wrong_size.reason}; " if wrong_size else ""
        return _defect(index, name, clip, notes + reason)
    if wrong_size or digest.hexdigest() == index.shard_sha256[number]:
        return wrong_size
    return _defect(index, name, None, "differs from the index behind its last clip")


def _first_different(index: Index, clips: np.ndarray, file: BinaryIO, digest: hashlib._Hash) -> tuple[int, str] | None:
    """The first clip whose part of the tar is not what was written, and what differs; feeds ``digest`` on the way."""
    for clip in clips:
        begin, end = index.record[clip].tolist()
        record = file.read(end - begin)
        if len(record) < end - begin:
            return clip, f"the file ends {end - begin - len(record)} bytes before the end of this clip"
        found = record_crc32(record, int(index.offset[clip]) - begin, int(index.size[clip]))
        different = [member for member, a, b in zip(MEMBERS, found, index.crc32[clip].tolist(), strict=True) if a != b]
        if different:
            return clip, f"{', '.join(different)} not as indexed"
        digest.update(record)
    return None


def _clips(index: Index, number: int) -> np.ndarray:
    """Clips lie in the index shard by shard."""
    begin, end = np.searchsorted(index.shard, [number, number + 1])
    return np.arange(begin, end)


def _defect(index: Index, name: str, clip: int | None, reason: str) -> Defect:
    if clip is None:
        return Defect(name, "", "", reason)
    return Defect(name, index.key(clip), index.id(clip), reason)


def _stamp(index: Index, number: int) -> list[int | str] | None:
    try:
        status = (index.folder / index.shards[number]).stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, index.shard_sha256[number]]


def _read_cache(folder: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads((folder / CACHE).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(folder: Path, known: dict[str, list[int | str]], parts: Iterable[dict[str, list[int | str]]]) -> None:
    merged = dict(known)
    for part in parts:
        merged |= part
    if merged != known and os.access(folder, os.W_OK):
        with suppress(OSError):  # only spares the next start some reading
            write_atomically(folder / CACHE, json.dumps(merged, indent=1, sort_keys=True).encode())
