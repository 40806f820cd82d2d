"""What is in a folder of shards, over all its splits: report.json, and report.html to look at.

For finding what training would learn without telling: wrong lengths and rates, texts and source videos that test and
train share, letters of another script, and what was rejected.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sltscale.data.shards.index import Index, open_index, splits
from sltscale.data.shards.report_page import Thumbnail, page
from sltscale.data.shards.split_report import Report, read_reports, reason_kind
from sltscale.data.shards.text_checks import EXAMPLES, duplicates, foreign_characters
from sltscale.data.video.stored import decode_clip
from sltscale.errors import InputError
from sltscale.files import write_atomically

BINS = 24
VALUES = 12  # frame rates and resolutions with a bar of their own
THUMBNAILS = 12
THUMBNAIL_SIZE = 192


def write_shard_report(folder: Path) -> None:
    """Write FOLDER/report.json and FOLDER/report.html, the same bytes for the same shards.

    InputError if the folder holds no shards, or something in it cannot be read or written.
    """
    indexes = {split: open_index(folder, split) for split in splits(folder)}
    reports = read_reports(folder)
    if not indexes and not reports:
        raise InputError(f"{folder} holds no index; expected a folder made by tools/make_shards.py")
    facts = shard_facts(indexes, reports)
    pictures = page(facts, _thumbnails(indexes))
    try:
        with _alone(folder) as alone:
            for scratch in folder.glob("report.*.tmp") if alone else ():  # of one that was killed
                scratch.unlink()
            write_atomically(folder / "report.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
            write_atomically(folder / "report.html", pictures)
    except OSError as error:
        raise InputError(f"{folder}: the report cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Splits may be packed side by side: waits for whoever writes the report. False where a folder cannot be locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def shard_facts(indexes: Mapping[str, Index], reports: Sequence[Report]) -> dict[str, Any]:
    """The content of report.json (docs/data.md says what its parts mean)."""
    texts = {split: index.texts() for split, index in indexes.items()}
    lengths = {split: np.array([len(text) for text in lines]) for split, lines in texts.items()}
    durations = {split: index.frames / _fps(index) for split, index in indexes.items()}
    return {
        "corpus": sorted({index.corpus for index in indexes.values()}),
        "splits": {split: _totals(index) for split, index in indexes.items()},
        "histograms": {
            "seconds": _histogram(durations),
            "frames": _histogram({split: index.frames for split, index in indexes.items()}),
            "characters": _histogram(lengths),
            "fps": _values({split: np.round(_fps(index), 2).astype(str) for split, index in indexes.items()}),
            "resolution": _values({split: _resolutions(index) for split, index in indexes.items()}),
        },
        "rejected": _rejected(reports),
        "notes": _notes(reports),
        "duplicate_texts": duplicates(texts, lambda split, clip: indexes[split].id(clip)),
        "shared_sources": _shared_sources(indexes),
        "foreign_characters": {
            split: {
                language: foreign_characters(texts[split], index.clips_of(language).tolist(), language, index.id)
                for language in index.languages()
            }
            for split, index in indexes.items()
        },
    }


def _totals(index: Index) -> dict[str, Any]:
    return {
        "clips": len(index),
        "hours": index.seconds / 3600,
        "frames": int(index.frames.sum()),
        "bytes": sum(index.shard_bytes),
        "shards": len(index.shards),
        "frame_size": index.frame_size,
        "languages": index.languages(),
        "sources": len(set(index.sources())),
        "signers": len(set(index.signers()) - {""}),
    }


def _fps(index: Index) -> np.ndarray:
    return index.fps[:, 0] / index.fps[:, 1]


def _resolutions(index: Index) -> np.ndarray:
    found, place = np.unique(index.resolution, axis=0, return_inverse=True)
    return np.array([f"{width} x {height}" for width, height in found.tolist()])[place.reshape(-1)]


def _histogram(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Counts per split between round edges; the last bin has no upper edge, for the rarest hundredth."""
    if not columns:
        return {"edges": [], "counts": {}}
    every = np.concatenate(list(columns.values()))
    low, high = float(every.min()), float(np.quantile(every, 0.99))
    rough = max((high - low) / BINS, 1e-3)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if every.dtype.kind in "iu":
        step = max(step, 1.0)
    first = math.floor(low / step)
    edges = [round(number * step, 6) for number in range(first, math.floor(high / step) + 1)]
    counts = {split: np.histogram(column, [*edges, np.inf])[0].tolist() for split, column in columns.items()}
    return {"edges": edges, "counts": counts}


def _values(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Counts per split of the most frequent values, by frequency, and of all others together."""
    if not columns:
        return {"values": [], "counts": {}}
    values, counts = np.unique(np.concatenate(list(columns.values())), return_counts=True)
    chosen = values[np.lexsort((values, -counts))][:VALUES]
    per_split = {split: [int((column == value).sum()) for value in chosen] for split, column in columns.items()}
    names = chosen.tolist()
    if len(values) > VALUES:
        names.append("others")
        for split, column in columns.items():
            per_split[split].append(len(column) - sum(per_split[split]))
    return {"values": names, "counts": per_split}


def _rejected(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """By reason, most frequent first. A row whose split is unknown stands in the report of every split."""
    kinds: dict[str, dict[tuple[str, int, str, str], dict[str, Any]]] = {}
    for report in reports:
        for row in report.rejected:
            same = (row.file, row.line, row.id, row.reason)
            kinds.setdefault(reason_kind(row.reason), {})[same] = asdict(row)
    ordered = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
    return [{"reason": kind, "count": len(rows), "examples": list(rows.values())[:EXAMPLES]} for kind, rows in ordered]


def _notes(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """The reader's notes; splits that were read together have the same."""
    found: list[dict[str, Any]] = []
    for report in reports:
        same = next((entry for entry in found if entry["notes"] == report.notes), None)
        if same:
            same["splits"].append(report.split)
        elif report.notes:
            found.append({"splits": [report.split], "notes": report.notes})
    return found


def _shared_sources(indexes: Mapping[str, Index]) -> dict[str, Any]:
    sources = {split: set(index.sources()) - {""} for split, index in indexes.items()}
    shared = {}
    for first, second in combinations(indexes, 2):
        common = sorted(sources[first] & sources[second])
        shared[f"{first} and {second}"] = {"sources": len(common), "examples": common[:EXAMPLES]}
    return shared


def _thumbnails(indexes: Mapping[str, Index]) -> list[Thumbnail]:
    """The middle frames of clips spread evenly over all splits."""
    every = [(index, len(index)) for index in indexes.values()]
    total = sum(count for _, count in every)
    chosen = sorted({int((number + 0.5) * total / THUMBNAILS) for number in range(THUMBNAILS)}) if total else []
    found = []
    for number in chosen:
        for index, count in every:
            if number < count:
                found.append(_thumbnail(index, number))
                break
            number -= count
    return found


def _thumbnail(index: Index, clip: int) -> Thumbnail:
    split, id, text = index.split, index.id(clip), index.text(clip)
    try:
        frame = decode_clip(index.video_bytes(clip), [int(index.frames[clip]) // 2])[0]
    except InputError as error:
        return Thumbnail(split, id, text, None, str(error))
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return Thumbnail(split, id, text, base64.b64encode(buffer.getvalue()).decode(), "")
