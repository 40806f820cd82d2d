"""Are the shards the ones that were indexed? Names the first clip that differs in each damaged shard, or all of them.

The whole of every tar is compared (its sha256), so a flipped bit in a tar header or in padding is found too; the
checksums of each clip's members then say where. ``check_shards`` does this before training, shared among the ranks,
and remembers what it has seen by size and modification time; so does ``bad_clips``, for a training that is to go on
without them; ``verify`` reads everything every time. Of shards behind a URL these two ask the sizes only: reading them
would be a download of the corpus, and each clip is compared with its sha256 when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sltscale import parallel
from sltscale.data.shards.index import BLOCK, SUFFIX, Index, open_index, record_crc32, splits
from sltscale.data.shards.remote import THREADS, LocalShards, RemoteShards, shard_source
from sltscale.data.shards.tar_members import scan
from sltscale.errors import InputError
from sltscale.files import write_atomically

CACHE = ".verified.json"
CHUNK = 1 << 20
NO_FILE = "cannot be read: No such file"


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


@dataclass(frozen=True)
class BadClip:
    """A clip whose part of its shard is not what was indexed. clip: its number in the index. shard: file name."""

    clip: int
    shard: str
    key: str
    id: str
    reason: str


def verify(index: Index) -> list[Defect]:
    """At most one Defect per shard, and one for the index itself. Reads every byte, also of shards behind a URL."""
    if not index.columns_intact():
        return [_index_defect(index)]
    found = (_read(index, index.files, number) for number in range(len(index.shards)))
    return [shard.defect for shard in found if shard.defect]


def verify_folder(folder: str | Path) -> list[str]:
    """One line for each tar of a folder that no index of the folder lists: what it holds, and what is foreign in it.

    None for a URL, behind which nothing but the indexes says what there is.
    """
    files = shard_source(folder)
    if not isinstance(files, LocalShards):
        return []
    indexed = {name for split in splits(folder) for name in open_index(folder, split).shards}
    tars = sorted(path for path in files.folder.glob("*.tar") if path.name not in indexed and path.is_file())
    lines = []
    for path in tars:
        try:
            found = scan(path)
            lines.append(f"{path.name}: in no index; {found.clips} clips, {found}")
        except OSError as error:
            lines.append(f"{path.name}: in no index; cannot be read: {error.strerror}")
    return lines


def check_shards(index: Index, rank: int, world_size: int) -> None:
    """Before the first step: raise InputError, the same on all ranks, if a shard does not match its index.

    Every rank reads its part of the shards. Shards that were verified before and have kept size and modification time
    are not read again; this is remembered in FOLDER/.verified.json where that can be written.
    """
    defects = [shard.defect for shard in _inspect(index, rank, world_size) if shard.defect]
    if defects:
        more = f" (and {len(defects) - 1} more)" if len(defects) > 1 else ""
        raise InputError(f"{index.folder}: {defects[0]}{more}; run sltscale shards verify, restore or pack again")


def bad_clips(index: Index, rank: int = 0, world_size: int = 1) -> list[BadClip]:
    """All clips whose part of a shard is not as indexed, ascending, the same list on all ranks; reads as check_shards.

    A shard that is damaged behind its last clip has no bad clips. InputError if the index itself is damaged.
    """
    shards = _inspect(index, rank, world_size)
    for shard in shards:
        if shard.defect == _index_defect(index):
            raise InputError(f"{index.folder}: {shard.defect}; restore it or pack again")
    return sorted((clip for shard in shards for clip in shard.bad), key=lambda bad: bad.clip)


@dataclass(frozen=True)
class _Shard:
    """What the comparison of one shard with its index has found."""

    defect: Defect | None
    bad: tuple[BadClip, ...] = ()


def _inspect(index: Index, rank: int, world_size: int) -> list[_Shard]:
    """The defective shards (an index that is damaged itself counts as one), found by all ranks together."""
    files = index.files
    mine = range(rank, len(index.shards), world_size)
    known: dict[str, _Stamp] = {}
    verified: dict[str, _Stamp] = {}
    if not index.columns_intact():
        shards = [_Shard(_index_defect(index))]
    elif isinstance(files, RemoteShards):
        with ThreadPoolExecutor(THREADS) as pool:
            sizes = pool.map(files.size, [index.shards[number] for number in mine])
            shards = [_compare_size(index, number, size) for number, size in zip(mine, sizes, strict=True)]
    else:
        known = _read_cache(files.folder)
        stamps = {number: stamp for number in mine if (stamp := _stamp(index, files, number))}
        shards = []
        for number in mine:
            stamp, name = stamps.get(number), index.shards[number]
            if stamp is None or known.get(name) != stamp:
                shards.append(_read(index, files, number))
                if stamp is not None and shards[-1].defect is None:
                    verified[name] = stamp
    found = parallel.gather_objects(([shard for shard in shards if shard.defect], verified))
    if rank == 0 and isinstance(files, LocalShards):
        _write_cache(files.folder, known, [part for _, part in found])
    every = {shard for part, _ in found for shard in part}
    return sorted(every, key=lambda shard: shard.defect.shard if shard.defect else "")


def _index_defect(index: Index) -> Defect:
    copy = f" (in the copy {index.path})" if isinstance(index.files, RemoteShards) else ""
    reason = f"the index itself is damaged: its columns do not match their checksum{copy}"
    return Defect(f"{index.split}{SUFFIX}", "", "", reason)


def _compare_size(index: Index, number: int, size: int | None) -> _Shard:
    clips = _clips(index, number).tolist()
    if size == index.shard_bytes[number]:
        return _Shard(None)
    if size is None:
        return _shard(index, number, dict.fromkeys(clips, NO_FILE), [NO_FILE])
    ends = index.record[clips, 1].tolist()
    faults = {clip: _cut(end - size) for clip, end in zip(clips, ends, strict=True) if end > size}
    return _shard(index, number, faults, [_wrong_size(index, number, size), *list(faults.values())[:1]])


def _read(index: Index, files: LocalShards | RemoteShards, number: int) -> _Shard:
    """Compare every byte of a shard with the index."""
    name, clips = index.shards[number], _clips(index, number).tolist()
    digest, size, read = hashlib.sha256(), 0, 0
    faults: dict[int, str] = {}
    reasons = []
    try:
        total = files.size(name)
        if total is None:
            return _compare_size(index, number, None)
        with files.open(name) as file:
            if file.peek(BLOCK)[257:262] not in (b"ustar", b""):
                reasons.append("not a tar file")
            for clip in clips:
                begin, end = index.record[clip].tolist()
                record = file.read(max(0, min(end - begin, total)))
                if reason := _difference(index, clip, record):
                    faults[clip] = reason
                digest.update(record)
                size, read = size + len(record), read + 1
            for chunk in iter(lambda: file.read(CHUNK), b""):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        return _shard(index, number, faults | dict.fromkeys(clips[read:], reason), [reason])
    if size != index.shard_bytes[number]:
        reasons.append(_wrong_size(index, number, size))
    reasons += list(faults.values())[:1]
    if not reasons and digest.hexdigest() == index.shard_sha256[number]:
        return _Shard(None)
    reasons = reasons or ["differs from the index behind its last clip"]
    if isinstance(files, LocalShards):
        with suppress(OSError):
            members = scan(files.folder / name)
            reasons += [str(members)] if members.foreign else []
    return _shard(index, number, faults, reasons)


def _difference(index: Index, clip: int, record: bytes) -> str:
    """What is not as it was written in a clip's part of a tar; empty if all is."""
    begin, end = index.record[clip].tolist()
    if len(record) < end - begin:
        return _cut(end - begin - len(record))
    found = record_crc32(record, int(index.offset[clip]) - begin, int(index.size[clip]))
    different = [
        member for member, a, b in zip(index.members, found, index.crc32[clip].tolist(), strict=True) if a != b
    ]
    return f"{', '.join(different)} not as indexed" if different else ""


def _cut(missing: int) -> str:
    return f"the file ends {missing} bytes before the end of this clip"


def _wrong_size(index: Index, number: int, size: int) -> str:
    return f"has {size} bytes instead of {index.shard_bytes[number]}"


def _shard(index: Index, number: int, faults: dict[int, str], reasons: Sequence[str]) -> _Shard:
    """faults: by clip, ascending. reasons: of the shard's defect."""
    name = index.shards[number]
    bad = tuple(BadClip(clip, name, index.key(clip), index.id(clip), reason) for clip, reason in faults.items())
    key, id = (bad[0].key, bad[0].id) if bad else ("", "")
    return _Shard(Defect(name, key, id, "; ".join(reasons)), bad)


def _clips(index: Index, number: int) -> np.ndarray:
    """Clips lie in the index shard by shard."""
    begin, end = np.searchsorted(index.shard, [number, number + 1])
    return np.arange(begin, end)


_Stamp = list[int | str]


def _stamp(index: Index, files: LocalShards, number: int) -> _Stamp | None:
    try:
        status = (files.folder / index.shards[number]).stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, index.shard_sha256[number]]


def _read_cache(folder: Path) -> dict[str, _Stamp]:
    try:
        known = json.loads((folder / CACHE).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(folder: Path, known: dict[str, _Stamp], parts: Iterable[dict[str, _Stamp]]) -> None:
    merged = dict(known)
    for part in parts:
        merged |= part
    if merged != known and os.access(folder, os.W_OK):
        with suppress(OSError):  # only spares the next start some reading
            write_atomically(folder / CACHE, json.dumps(merged, indent=1, sort_keys=True).encode())
