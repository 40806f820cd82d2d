"""Clips into a tar of WebDataset's layout, the same bytes for the same clips, and where each of them lies in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sltscale.data.shards.index import BLOCK, Row, Shard, padded, record_crc32

os.environ["WDS_SECURE"] = "1"  # read at import: no pickles, no shell pipes

import webdataset


@dataclass(frozen=True)
class Sample:
    """A clip on its way into a tar. facts: its json member. data: its mp4 or safetensors member. columns: those fields
    of its Row that do not say where it lies."""

    facts: Mapping[str, Any]
    data: bytes
    columns: Mapping[str, Any]


def write_tar(tar: Path, samples: Iterable[Sample], member: str = "mp4") -> Shard:
    """Write a tar at once or not at all, each clip as KEY.json, KEY.``member`` and KEY.txt; without clips there is no
    tar. Returns its facts, with the checksums of what was really written."""
    scratch = tar.with_name(f"{tar.name}.tmp")
    rows: list[Row] = []
    try:
        with scratch.open("w+b") as file:
            with webdataset.TarWriter(file, user="root", group="root", mode=0o444, mtime=0) as writer:
                rows.extend(_write(writer, sample, member) for sample in samples)
            file.flush()
            os.fsync(file.fileno())
            rows, size, digest = _with_checksums(rows, file)
        if rows:
            scratch.replace(tar)
        else:
            tar.unlink(missing_ok=True)
    finally:
        scratch.unlink(missing_ok=True)
    return Shard(tar.name, size, digest, rows)


def _write(writer: Any, sample: Sample, member: str) -> Row:
    begin = writer.tarstream.offset
    content = json.dumps(sample.facts, ensure_ascii=False, sort_keys=True).encode()
    columns = sample.columns
    writer.write(
        {"__key__": columns["key"], "json": content, member: sample.data, "txt": str(columns["text"]).encode()}
    )
    return Row(
        **columns,
        offset=begin + BLOCK + padded(len(content)) + BLOCK,
        size=len(sample.data),
        sha256=hashlib.sha256(sample.data).hexdigest(),
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
        place = row.offset - row.record[0]
        if hashlib.sha256(record[place : place + row.size]).hexdigest() != row.sha256:
            raise AssertionError(f"{row.key}: the tar writer lays out its members differently")
        digest.update(record)
        summed.append(replace(row, crc32=record_crc32(record, place, row.size)))
    digest.update(file.read())
    return summed, file.tell(), digest.hexdigest()
