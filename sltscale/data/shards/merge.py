"""Finished parts into an index and a report for each split: the end of every packing, in one run or in an array."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sltscale.data.shards.features import Origin
from sltscale.data.shards.index import write_index
from sltscale.data.shards.parts import Part, Parts, begun_splits
from sltscale.data.shards.report import write_shard_report
from sltscale.data.shards.split_report import Report
from sltscale.errors import InputError
from sltscale.files import write_atomically

NAMED = 10  # missing shards named in a message


def merge(out: Path) -> list[Report]:
    """Index and reports of all splits that the tasks of an array have packed into ``out``.

    InputError if ``out`` holds no such work, if parts are missing (it says which), or while a task is at work.
    """
    splits = [Parts(Path(out), split) for split in begun_splits(out)]
    if not splits:
        raise InputError(f"{out} holds no parts; expected a folder that tools/make_shards.py --part has packed into")
    try:
        with contextlib.ExitStack() as stack:
            for parts in splits:
                stack.enter_context(parts.held(None))
            for parts in splits:
                _check_complete(parts)
            reports = [merge_split(parts) for parts in splits]
            write_shard_report(Path(out))
    except OSError as error:
        raise InputError(f"{out}: cannot be read or written: {error.strerror or error}") from None
    check_any_packed(reports)
    return reports


def merge_split(parts: Parts) -> Report:
    """SPLIT.report.json and, unless no clip is usable, SPLIT.index.safetensors. The split must be held and complete."""
    report = summarise(parts, range(parts.count()))
    write_atomically(parts.out / f"{report.split}.report.json", report.to_json())
    if report.packed:
        shards = (part.shard for part in _finished(parts, range(parts.count())) if part.shard.rows)
        settings = report.settings
        features = Origin.from_json(settings["features"]) if "features" in settings else None
        write_index(
            *(parts.out, parts.split, shards),
            corpus=settings["corpus"],
            frame_size=settings["frame_size"],
            features=features,
        )
    return report


def summarise(parts: Parts, numbers: Iterable[int]) -> Report:
    """What became of the clips of these (finished) shards; rows that the reader rejected count in any case."""
    rejected, notes = parts.reader()
    packed, frames, seconds, size, shards = 0, 0, 0.0, 0, 0
    for part in _finished(parts, numbers):
        rows = part.shard.rows
        rejected += part.rejected
        packed += len(rows)
        frames += sum(row.frames for row in rows)
        seconds += part.shard.seconds
        size += part.shard.bytes if rows else 0
        shards += bool(rows)
    return Report(
        split=parts.split,
        packed=packed,
        rejected=tuple(sorted(rejected, key=lambda row: (row.file, row.line, row.id))),
        frames=frames,
        seconds=seconds,
        bytes=size,
        shards=shards,
        settings=parts.settings(),
        notes=notes,
    )


def check_any_packed(reports: Iterable[Report]) -> None:
    """InputError if not a single clip is usable; the reports are written by then."""
    reports = list(reports)
    if any(report.packed for report in reports):
        return
    row = next((row for report in reports for row in report.rejected), None)
    first = f"; the first: {row.file or 'annotations'}, line {row.line}: {row.reason}" if row else ""
    raise InputError(f"nothing could be packed; {'; '.join(report.summary() for report in reports)}{first}")


def _finished(parts: Parts, numbers: Iterable[int]) -> Iterator[Part]:
    for number in numbers:
        part = parts.read(number)
        if part is None:
            raise InputError(f"{parts.tar(number)} or its record in parts/ was changed meanwhile; pack again")
        yield part


def _check_complete(parts: Parts) -> None:
    missing = [number for number in range(parts.count()) if not parts.recorded(number)]
    if not missing:
        return
    names = ", ".join(f"{number:06d}" for number in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    tasks = parts.tasks()
    again = "run tools/make_shards.py again as before"
    if tasks is not None:
        numbers = sorted({number % tasks for number in missing})
        again += f" with --part {' and '.join(f'{number}/{tasks}' for number in numbers)}, or once without --part"
    raise InputError(
        f"{parts.out}: {len(missing)} of {parts.count()} shards of split {parts.split} are not packed: {names}; {again}"
    )
