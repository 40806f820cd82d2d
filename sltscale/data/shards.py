"""Clips into shards: WebDataset tars that anyone can open, and the index through which sltscale reads them.

Shard s of a split holds the candidate clips [s * n, (s + 1) * n) in annotation order, less those that prove unusable.
So a shard is a unit of work of its own: finished ones are kept when a run is interrupted, and the bytes do not depend
on the number of workers. Workers turn clips into mp4 bytes; this process alone writes files, each at once or not at
all: the tar, then parts/SPLIT-NNNNNN.json with its rows (the sign that the tar is finished), in the end the index.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sltscale.data.clips import SPLITS, Clip, Cutting, Rejected
from sltscale.data.corpora import read_corpus
from sltscale.data.encoding import ENCODER, PackedClip
from sltscale.data.index import BLOCK, Row, Shard, padded, record_crc32, write_index
from sltscale.data.index import splits as packed_splits
from sltscale.data.packing import packing
from sltscale.errors import InputError
from sltscale.files import write_atomically

os.environ.setdefault("WDS_SECURE", "1")  # read at import: no pickles, no shell pipes

import webdataset

CLIPS_PER_SHARD = 500
KEY_LENGTH = 80


@dataclass(frozen=True)
class Report:
    """What became of a split's clips. settings: all that its bytes depend on."""

    split: str
    packed: int
    rejected: tuple[Rejected, ...]
    frames: int
    seconds: float
    bytes: int
    shards: int
    settings: dict[str, Any]

    def to_json(self) -> str:
        facts = asdict(self) | {"hours": self.seconds / 3600, "rejected_count": len(self.rejected)}
        facts["rejected_by_reason"] = dict(self._by_reason().most_common())
        return json.dumps(facts, indent=1, ensure_ascii=False, sort_keys=True) + "\n"

    def summary(self) -> str:
        """One line; reasons without their numbers, so that like ones are counted together."""
        reasons = "".join(f"; {count} x {reason}" for reason, count in self._by_reason().most_common())
        return (
            f"{self.split}: {self.packed} clips, {self.frames} frames, {self.seconds / 3600:.3f} h, "
            f"{self.bytes / 1e6:.1f} MB in {self.shards} shards; {len(self.rejected)} rejected{reasons}"
        )

    def _by_reason(self) -> Counter[str]:
        return Counter(re.sub(r"'.*'|[0-9]+([.:][0-9]+)*", "_", rejected.reason) for rejected in self.rejected)


def make_shards(
    corpus: str,
    annotations: Path,
    videos: Path,
    out: Path,
    *,
    splits: Sequence[str] = (),
    frame_size: int = 256,
    language: str = "en",
    workers: int | None = None,
    clips_per_shard: int = CLIPS_PER_SHARD,
    name: str | None = None,
    progress: bool = True,
) -> list[Report]:
    """Pack these ``splits`` (all, if none is named) of a corpus into ``out``, one index each.

    name: written into the index (the corpus's name, if not given). workers: processes, one per available CPU if not
    given. Goes on where an interrupted run stopped. InputError if the input cannot be used, if ``out`` was begun with
    other input or settings, or if no clip at all could be packed.
    """
    clips, rejected = read_corpus(corpus, Path(annotations), Path(videos), language=language)
    found = {clip.split for clip in clips} | {row.split for row in rejected}
    present = [split for split in SPLITS if split in found]
    missing = [split for split in splits if split not in present]
    if missing:
        first = f"; {len(rejected)} rows rejected, the first: {rejected[0].reason}" if rejected else ""
        raise InputError(f"{annotations}: no clip of split {missing[0]!r}; found {', '.join(present) or 'none'}{first}")
    reports = [
        write_shards(
            [clip for clip in clips if clip.split == split],
            [row for row in rejected if row.split in (split, "")],
            Path(out),
            split=split,
            corpus=name or corpus,
            frame_size=frame_size,
            workers=workers or len(os.sched_getaffinity(0)),
            clips_per_shard=clips_per_shard,
            progress=progress,
        )
        for split in (splits or present)
    ]
    if not any(report.packed for report in reports):
        first = f"; the first: line {rejected[0].line}, {rejected[0].reason}" if rejected else ""
        raise InputError(
            f"{annotations}: nothing could be packed; {'; '.join(r.summary() for r in reports) or 'no split'}{first}"
        )
    return reports


def write_shards(
    clips: Sequence[Clip],
    rejected: Sequence[Rejected],
    out: Path,
    *,
    split: str,
    corpus: str,
    frame_size: int,
    workers: int = 1,
    clips_per_shard: int = CLIPS_PER_SHARD,
    progress: bool = True,
) -> Report:
    """Pack the clips of one split into ``out``; the report (also OUT/SPLIT.report.json) lists every reject.

    Writes OUT/SPLIT-NNNNNN.tar and, unless no clip is usable, OUT/SPLIT.index.safetensors. InputError if ``out``
    cannot be written or holds work begun with other settings.
    """
    if frame_size < 16 or frame_size % 2:
        raise InputError(f"frame size {frame_size}: expected an even number of pixels from 16 up")
    if clips_per_shard < 1 or workers < 1:
        raise InputError(f"{clips_per_shard} clips a shard, {workers} workers: expected at least 1 of each")
    settings = {
        "format": 1,
        "corpus": corpus,
        "split": split,
        "frame_size": frame_size,
        "clips_per_shard": clips_per_shard,
        "encoder": ENCODER,
        "clips": len(clips),
        "clips_sha256": _fingerprint(clips),
    }
    keys = _keys([clip.id for clip in clips])
    parts = [range(i, min(i + clips_per_shard, len(clips))) for i in range(0, len(clips), clips_per_shard)]
    try:
        with _begun(out, split, settings):
            finished = {number: part for number in range(len(parts)) if (part := _read_part(out, split, number))}
            todo = [number for number in range(len(parts)) if number not in finished]
            done = sum(len(parts[number]) for number in finished)
            with (
                tqdm(
                    total=len(clips), initial=done, desc=split, unit="clip", disable=None if progress else True
                ) as bar,
                packing([clips[i] for number in todo for i in parts[number]], Cutting(frame_size), workers) as packed,
            ):
                for number in todo:
                    todo_clips = [(clips[i], keys[i]) for i in parts[number]]
                    finished[number] = _write_part(out, split, number, todo_clips, packed, bar)
            return _merge(out, [finished[number] for number in range(len(parts))], rejected, settings)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); what is finished is kept, "
            "the same command goes on from there"
        ) from None


@dataclass(frozen=True)
class _Part:
    """A finished shard (with no rows, and no tar, if all its clips were rejected)."""

    shard: Shard
    rejected: list[Rejected]


def _write_part(
    out: Path,
    split: str,
    number: int,
    clips: Sequence[tuple[Clip, str]],
    packed: Iterator[PackedClip | str],
    bar: Any,
) -> _Part:
    tar = out / f"{split}-{number:06d}.tar"
    scratch = tar.with_name(f"{tar.name}.{os.getpid()}.tmp")
    rows: list[Row] = []
    rejected: list[Rejected] = []
    try:
        with scratch.open("w+b") as file:
            with webdataset.TarWriter(file, user="root", group="root", mode=0o444, mtime=0) as writer:
                for clip, key in clips:
                    result = next(packed)
                    if isinstance(result, PackedClip):
                        rows.append(_write_clip(writer, clip, key, result))
                    else:
                        rejected.append(Rejected(clip.id, clip.line, result, clip.split))
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
            rows, size, digest = _with_checksums(rows, file)
        if rows:
            scratch.replace(tar)
        else:
            tar.unlink(missing_ok=True)
    finally:
        scratch.unlink(missing_ok=True)
    part = _Part(Shard(tar.name, size, digest, rows), rejected)
    write_atomically(_part_path(out, split, number), json.dumps(asdict(part), ensure_ascii=False).encode())
    return part


def _write_clip(writer: Any, clip: Clip, key: str, packed: PackedClip) -> Row:
    begin = writer.tarstream.offset
    facts = {
        "id": clip.id,
        "text": clip.text,
        "language": clip.language,
        "split": clip.split,
        "frames": packed.frames,
        "fps": [packed.fps.numerator, packed.fps.denominator],
        "source": clip.path.name,
        "start": None if clip.start is None else float(clip.start),
        "end": None if clip.end is None else float(clip.end),
    }
    content = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
    writer.write({"__key__": key, "json": content, "mp4": packed.data, "txt": clip.text.encode()})
    return Row(
        id=clip.id,
        key=key,
        text=clip.text,
        language=clip.language,
        frames=packed.frames,
        fps=(packed.fps.numerator, packed.fps.denominator),
        offset=begin + BLOCK + padded(len(content)) + BLOCK,
        size=len(packed.data),
        sha256=hashlib.sha256(packed.data).hexdigest(),
        record=(begin, writer.tarstream.offset),
        crc32=(0, 0, 0),
    )


def _with_checksums(rows: Sequence[Row], file: Any) -> tuple[list[Row], int, str]:
    """Rows with the checksums of what was really written, and size and sha256 of the whole tar."""
    digest = hashlib.sha256()
    summed = []
    file.seek(0)
    for row in rows:
        record = file.read(row.record[1] - row.record[0])
        mp4 = row.offset - row.record[0]
        if hashlib.sha256(record[mp4 : mp4 + row.size]).hexdigest() != row.sha256:
            raise AssertionError(f"{row.key}: the tar writer lays out its members differently")
        digest.update(record)
        summed.append(replace(row, crc32=record_crc32(record, mp4, row.size)))
    digest.update(file.read())
    return summed, file.tell(), digest.hexdigest()


def _merge(out: Path, parts: Sequence[_Part], rejected: Sequence[Rejected], settings: dict[str, Any]) -> Report:
    shards = [part.shard for part in parts if part.shard.rows]
    rows = [row for shard in shards for row in shard.rows]
    every = sorted((*rejected, *(r for part in parts for r in part.rejected)), key=lambda r: (r.line, r.id))
    report = Report(
        split=settings["split"],
        packed=len(rows),
        rejected=tuple(every),
        frames=sum(row.frames for row in rows),
        seconds=sum(row.frames * row.fps[1] / row.fps[0] for row in rows),
        bytes=sum(shard.bytes for shard in shards),
        shards=len(shards),
        settings=settings,
    )
    write_atomically(out / f"{report.split}.report.json", report.to_json().encode())
    if rows:
        write_index(out, report.split, shards, corpus=settings["corpus"], frame_size=settings["frame_size"])
    return report


@contextlib.contextmanager
def _begun(out: Path, split: str, settings: dict[str, Any]) -> Iterator[None]:
    """Hold the split for this process, refuse to mix it with work under other settings, clear interrupted writes."""
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{split}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another process is packing split {split} here; wait for it or kill it") from None
        path = folder / f"{split}.settings.json"
        content = json.dumps(settings, indent=1, sort_keys=True).encode()
        if path.exists():
            begun = json.loads(path.read_bytes())
            if begun != settings:
                name = next(n for n in sorted(settings.keys() | begun) if settings.get(n) != begun.get(n))
                difference = f"with {name} {begun.get(name)!r}, now {settings.get(name)!r}"
                if name in ("clips", "clips_sha256"):
                    difference = "from other annotations or videos"
                raise InputError(
                    f"{out}: split {split} was begun {difference}; give another --out or delete the folder"
                )
        elif split in packed_splits(out):
            raise InputError(f"{out}: already holds split {split}, without parts/; give another --out or delete it")
        else:
            write_atomically(path, content)
        for scratch in (*out.glob(f"{split}[-.]*.tmp"), *folder.glob(f"{split}[-.]*.tmp")):
            scratch.unlink()
        yield


def _part_path(out: Path, split: str, number: int) -> Path:
    return out / "parts" / f"{split}-{number:06d}.json"


def _read_part(out: Path, split: str, number: int) -> _Part | None:
    """None if that shard is not finished, its record is unreadable, or its tar is gone or has another size."""
    path = _part_path(out, split, number)
    if not path.exists():
        return None
    tuples = ("fps", "record", "crc32")
    try:
        part = json.loads(path.read_bytes())
        rows = [Row(**(row | {name: tuple(row[name]) for name in tuples})) for row in part["shard"]["rows"]]
        shard = Shard(**(part["shard"] | {"rows": rows}))
    except (ValueError, KeyError, TypeError):
        return None
    tar = out / shard.name
    if rows and not (tar.is_file() and tar.stat().st_size == shard.bytes):
        return None
    return _Part(shard, [Rejected(**rejected) for rejected in part["rejected"]])


def _keys(ids: Sequence[str]) -> list[str]:
    """WebDataset keys: unique, of [A-Za-z0-9_-] only (a key ends at the first dot), not beginning with a hyphen."""
    if len(set(ids)) != len(ids):
        raise InputError(f"clip id {Counter(ids).most_common(1)[0][0]!r} is used twice; expected unique ids")
    keys: list[str] = []
    taken: set[str] = set()
    for id in ids:
        key = re.sub(r"^-|[^A-Za-z0-9_-]", "_", id)
        if key in taken or len(key) > KEY_LENGTH:
            key = f"{key[: KEY_LENGTH - 17]}-{hashlib.sha256(id.encode()).hexdigest()[:16]}"
        taken.add(key)
        keys.append(key)
    return keys


def _fingerprint(clips: Sequence[Clip]) -> str:
    """What the annotation says of each clip; the folder that the videos lie in may change between runs."""
    digest = hashlib.sha256()
    for clip in clips:
        span = [str(clip.start), str(clip.end)]
        digest.update(json.dumps([clip.id, clip.path.name, *span, clip.text, clip.language]).encode() + b"\n")
    return digest.hexdigest()
