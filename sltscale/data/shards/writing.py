"""Clips into shards: WebDataset tars that anyone can open, and the index through which sltscale reads them.

Shard s of a split holds the candidate clips [s * n, (s + 1) * n) in annotation order, less those that prove unusable.
So a shard is a unit of work of its own: finished ones are kept when a run is interrupted, tasks of an array can share
them out, and the bytes do not depend on the number of workers or tasks. Workers turn clips into mp4 bytes; this process
alone writes files, each at once or not at all: the tar, then its record in parts/ (the sign that it is finished), in
the end the index.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sltscale.data.clips import Clip, Cutting, Rejected
from sltscale.data.corpora import read_corpus
from sltscale.data.shards.forecast import Forecast, check_space, chosen_splits, forecast
from sltscale.data.shards.merge import check_any_packed, merge_split, summarise
from sltscale.data.shards.packing import packing
from sltscale.data.shards.parts import Part, Parts
from sltscale.data.shards.report import write_shard_report
from sltscale.data.shards.split_report import Report
from sltscale.data.shards.tars import Sample, write_tar
from sltscale.data.video.encoding import PackedClip
from sltscale.data.video.presets import PRESETS
from sltscale.errors import InputError
from sltscale.files import readable_bytes

CLIPS_PER_SHARD = 500
KEY_LENGTH = 80
LOGGED_SECONDS = 60.0  # between lines on progress where nobody watches
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def make_shards(
    corpus: str,
    annotations: Sequence[Path],
    videos: Path,
    out: Path,
    *,
    cutting: Cutting,
    captions: Path | None = None,
    split: str | None = None,
    language: str | None = None,
    workers: int | None = None,
    clips_per_shard: int = CLIPS_PER_SHARD,
    part: tuple[int, int] | None = None,
    name: str | None = None,
    progress: bool = True,
) -> list[Report]:
    """Pack a corpus into ``out``: tars, an index and a report for each split, one report over all.

    captions, split, language: as ``corpora.read_corpus`` takes them; with ``split``, only that one is packed. workers:
    processes, one per available CPU if not given. part: (i, n) packs only the shards whose number leaves i when divided
    by n, and writes neither index nor report; ``merge.merge`` does when all n are done. name: written into the index
    (the corpus's name, if not given).

    Goes on where an interrupted run stopped. InputError if the input cannot be used, if ``out`` was begun with other
    input or settings, if another process packs the same shards, if the disk is full or far too small, or if no clip at
    all could be packed.
    """
    read = read_corpus(corpus, annotations, videos, language=language, split=split, captions=captions)
    packer = _Packer(Path(out), cutting, name or corpus, clips_per_shard, part, read.notes)
    jobs = [
        packer.job(
            chosen,
            [clip for clip in read.clips if clip.split == chosen],
            [row for row in read.rejected if row.split in (chosen, "")],
        )
        for chosen in chosen_splits(read, split, annotations)
    ]
    reports = packer.pack(jobs, len(os.sched_getaffinity(0)) if workers is None else workers, progress)
    if part is None:
        check_any_packed(reports)
    return reports


def write_shards(
    clips: Sequence[Clip],
    rejected: Sequence[Rejected],
    out: Path,
    *,
    split: str,
    corpus: str,
    cutting: Cutting,
    workers: int = 1,
    clips_per_shard: int = CLIPS_PER_SHARD,
    progress: bool = True,
) -> Report:
    """Pack the clips of one split into ``out``, whoever read them; as ``make_shards`` does it."""
    packer = _Packer(out, cutting, corpus, clips_per_shard)
    (report,) = packer.pack([packer.job(split, clips, rejected)], workers, progress)
    return report


@dataclass(frozen=True)
class _Job:
    """A split's clips and the numbers of the shards that this process packs."""

    parts: Parts
    clips: Sequence[Clip]
    rejected: Sequence[Rejected]
    settings: dict[str, Any]
    numbers: Sequence[int]

    def shard(self, number: int) -> Sequence[Clip]:
        size = self.settings["clips_per_shard"]
        return self.clips[number * size : (number + 1) * size]


@dataclass(frozen=True)
class _Packer:
    """What the splits of one packing have in common."""

    out: Path
    cutting: Cutting
    corpus: str
    clips_per_shard: int
    part: tuple[int, int] | None = None
    notes: dict[str, int] = field(default_factory=dict)

    def job(self, split: str, clips: Sequence[Clip], rejected: Sequence[Rejected]) -> _Job:
        if self.clips_per_shard < 1:
            raise InputError(f"{self.clips_per_shard} clips a shard: expected at least 1")
        first, step = self.part or (0, 1)
        if not 0 <= first < step:
            raise InputError(f"part {first}/{step}: expected I/N with I from 0 to N - 1")
        settings = {
            "format": 2,
            "corpus": self.corpus,
            "split": split,
            **json.loads(json.dumps(asdict(self.cutting), default=str)),
            "clips_per_shard": self.clips_per_shard,
            "encoder": PRESETS[self.cutting.preset].options,
            "clips": len(clips),
            "clips_sha256": _fingerprint(clips),
        }
        numbers = range(first, -(-len(clips) // self.clips_per_shard), step)
        return _Job(Parts(self.out, split), clips, rejected, settings, numbers)

    def pack(self, jobs: Sequence[_Job], workers: int, progress: bool) -> list[Report]:
        if workers < 1:
            raise InputError(f"{workers} workers: expected at least 1")
        try:
            with contextlib.ExitStack() as stack:
                for job in jobs:
                    stack.enter_context(job.parts.held(None if self.part is None else job.numbers))
                    # All splits are begun before the first is packed, so that a merge misses those that never came up.
                    job.parts.begin(job.settings, job.rejected, self.notes, self.part[1] if self.part else None)
                check_space(self.out, self._left(jobs))
                for job in jobs:
                    _pack_split(job, self.cutting, workers, progress)
                if self.part is not None:
                    return [summarise(job.parts, job.numbers) for job in jobs]
                reports = [merge_split(job.parts) for job in jobs]
                write_shard_report(self.out)
                return reports
        except OSError as error:
            raise InputError(
                f"{self.out}: cannot be written ({error.strerror or error}); {self._shortage(jobs, error)}what is "
                "finished is kept, the same command goes on from there"
            ) from None

    def _left(self, jobs: Sequence[_Job]) -> Forecast:
        """What is still to be packed, judged by what is packed."""
        left: list[Clip] = []
        size, seconds = 0, 0.0
        for job in jobs:
            for number in job.numbers:
                part = job.parts.read(number)
                if part is None:
                    left += job.shard(number)
                elif part.shard.rows:
                    size, seconds = size + part.shard.bytes, seconds + part.shard.seconds
        return forecast(left, self.cutting, size / seconds if seconds else None)

    def _shortage(self, jobs: Sequence[_Job], error: OSError) -> str:
        if error.errno not in DISK_FULL:
            return ""
        left = self._left(jobs)
        size = "an unknown number of bytes" if left.bytes is None else f"about {readable_bytes(left.bytes)}"
        free = readable_bytes(shutil.disk_usage(self.out).free)
        return f"{size} more needed for {left.clips} clips, {free} free; "


def _pack_split(job: _Job, cutting: Cutting, workers: int, progress: bool) -> None:
    keys = dict(zip((clip.id for clip in job.clips), _keys([clip.id for clip in job.clips]), strict=True))
    todo = [number for number in job.numbers if job.parts.read(number) is None]
    clips = [clip for number in todo for clip in job.shard(number)]
    total = sum(len(job.shard(number)) for number in job.numbers)
    # In the log of a batch job a line now and then, of a short run none.
    pause = 0.1 if sys.stderr.isatty() else LOGGED_SECONDS
    bar = tqdm(
        total=total,
        initial=total - len(clips),
        desc=job.parts.split,
        unit="clip",
        disable=not progress,
        mininterval=pause,
        maxinterval=max(10.0, pause),
        delay=pause,
    )
    with bar, packing(clips, cutting, workers) as packed:
        for number in todo:
            chosen = [(clip, keys[clip.id]) for clip in job.shard(number)]
            rejected: list[Rejected] = []
            shard = write_tar(job.parts.tar(number), _samples(chosen, packed, rejected, bar))
            job.parts.write(number, Part(shard, rejected))


def _samples(
    clips: Sequence[tuple[Clip, str]], packed: Iterator[PackedClip | str], rejected: list[Rejected], bar: Any
) -> Iterator[Sample]:
    """What goes into the tar; those that cannot be packed are added to ``rejected``."""
    for clip, key in clips:
        result = next(packed)
        if isinstance(result, PackedClip):
            yield _sample(clip, key, result)
        else:
            rejected.append(Rejected(clip.id, clip.line, result, clip.split, clip.file))
        bar.update()


def _sample(clip: Clip, key: str, packed: PackedClip) -> Sample:
    facts = {
        "id": clip.id,
        "text": clip.text,
        "language": clip.language,
        "split": clip.split,
        "frames": packed.frames,
        "fps": [packed.fps.numerator, packed.fps.denominator],
        "source": _source(clip),
        "signer": clip.signer,
        "start": None if clip.start is None else float(clip.start),
        "end": None if clip.end is None else float(clip.end),
    }
    columns = {
        "id": clip.id,
        "key": key,
        "text": clip.text,
        "language": clip.language,
        "frames": packed.frames,
        "fps": (packed.fps.numerator, packed.fps.denominator),
        "source": _source(clip),
        "signer": clip.signer,
        "resolution": (packed.width, packed.height),
    }
    return Sample(facts, packed.data, columns)


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


def _source(clip: Clip) -> str:
    """The name of a clip's video or folder of images; PHOENIX's are called NAME/1."""
    return f"{clip.path.parent.name}/1" if clip.path.name == "1" else clip.path.name


def _fingerprint(clips: Sequence[Clip]) -> str:
    """What the annotation says of each clip; the folder that the videos lie in may change between runs."""
    digest = hashlib.sha256()
    for clip in clips:
        where = [_source(clip), str(clip.start), str(clip.end), str(clip.fps), clip.crop, clip.images]
        said = [clip.text, clip.language, clip.signer]
        digest.update(json.dumps([clip.id, *where, *said]).encode() + b"\n")
    return digest.hexdigest()
