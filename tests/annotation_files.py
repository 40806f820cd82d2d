"""Annotation files as the corpora have them, and the real ones where they are at hand."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sltscale.data.clips import Rejected

OPENASL = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit"
HOW2SIGN = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE"
PHOENIX = "name|video|start|end|speaker|orth|translation"
REAL = Path(__file__).parents[2] / "shared" / "annotations"


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def write_labels(path: Path, labels: Any) -> Path:
    path.write_bytes(gzip.compress(pickle.dumps(labels)))
    return path


def real(*names: str) -> list[Path]:
    paths = [REAL / name for name in names]
    if not all(path.is_file() for path in paths):
        pytest.skip("the real annotation files are not on this machine")
    return paths


def reasons(rejected: Sequence[Rejected]) -> list[tuple[str, int, str]]:
    return [(row.id, row.line, row.reason) for row in rejected]


def openasl_row(
    vid: str, yid: str = "b", start: str = "00:00:01.000", end: str = "00:00:02.500", text: str = "Hi."
) -> str:
    return f"{vid}\t{yid}\t{start}\t{end}\t{text}\t\t\ttrain"


def label(name: str, text: str, images: int = 2, **changes: Any) -> dict[str, Any]:
    paths = [f"{name}/images{number:04d}.png" for number in range(1, images + 1)]
    return {"name": name, "gloss": "EINS", "text": text, "length": images, "imgs_path": paths} | changes


def cue(start: str, end: str, text: str) -> str:
    return f"00:{start} --> 00:{end}\n{text}\n"
