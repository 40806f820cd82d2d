"""What an evaluation leaves behind: metrics.json, hypotheses.tsv, rankings.tsv, and a table for the terminal.

Translation and retrieval may write into the same folder: their metrics stand side by side in one metrics.json. Every
file is written beside its place and renamed, so that a killed run leaves the old file or the new one, never half.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sltscale.errors import InputError
from sltscale.evaluation import retrieval
from sltscale.evaluation.translation import one_line
from sltscale.files import write_atomically

LISTED = 5  # candidates named per clip and direction in rankings.tsv
# An id like -Ab3_x may stay as it is: without operators, brackets or spaces it cannot be a formula worth the name.
_PLAIN = re.compile(r"-?[\w.:-]*")


def prepare(folder: Path, index: str, split: str) -> None:
    """InputError before any decoding if ``folder`` cannot be written or holds scores of another split or index."""
    _merged(folder, {"index": index, "split": split})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose a folder that can be written") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {folder}; choose a folder that can be written")


def write_translation(
    folder: Path, ids: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], scores: Mapping[str, Any]
) -> None:
    """hypotheses.tsv (id, reference, hypothesis) and the translation's part of metrics.json in ``folder``.

    Texts are brought to one line, as they were scored; the columns give the same scores again:
    ``cut -f2 hypotheses.tsv | tail -n +2`` are the references, ``cut -f3`` the hypotheses.
    """
    _same_length(ids=ids, hypotheses=hypotheses, references=references)
    metrics = _merged(folder, scores)
    rows = zip(ids, references, hypotheses, strict=True)
    _write(folder / "hypotheses.tsv", _tsv(("id", "reference", "hypothesis"), rows))
    _write(folder / "metrics.json", metrics)


def write_retrieval(
    folder: Path,
    ids: Sequence[str],
    texts: Sequence[str],
    similarity: npt.ArrayLike | torch.Tensor,
    scores: Mapping[str, Any],
) -> None:
    """rankings.tsv (per clip: expected rank and the best five ids both ways) and the retrieval's part of metrics.json.

    similarity [clips, clips]: row = video, column = sentence, as for ``retrieval.score_both``. A retrieved sentence is
    named by its first clip, a retrieved group of videos with one sentence by its best video.
    """
    _same_length(ids=ids, texts=texts)
    items = retrieval.merge_duplicates(similarity, texts)
    counts = {"retrieval_clips": len(ids), "retrieval_sentences": len(items.clip_of_text)}
    metrics = _merged(folder, {**scores, **counts})
    t2v_ranks = retrieval.ranks(items.text_to_video)
    v2t_ranks = retrieval.ranks(items.video_to_text, targets=items.text_of_clip)
    rows = []
    for clip, (clip_id, text) in enumerate(zip(ids, texts, strict=True)):
        sentence = items.text_of_clip[clip]
        videos = _best_videos(items, sentence)
        sentences = items.clip_of_text[_best(items.video_to_text[clip])]
        lists = [" ".join(ids[i] for i in found) for found in (videos, sentences)]
        rows.append((clip_id, text, f"{t2v_ranks[sentence]:g}", f"{v2t_ranks[clip]:g}", *lists))
    _write(folder / "rankings.tsv", _tsv(("id", "text", "t2v_rank", "v2t_rank", "t2v_top5", "v2t_top5"), rows))
    _write(folder / "metrics.json", metrics)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns of plain text; the first row is the header. Numbers stand right, floats with two decimals."""
    header, *body = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(header, *body, strict=True))
    widths = [max(_width(cell) for cell in column) for column in columns]
    right = [
        bool(values) and all(isinstance(value, int | float) or value is None for value in values)
        for values in zip(*rows[1:], strict=True)
    ] or [False] * len(header)
    lines = []
    for cells in (header, ["-" * width for width in widths], *body):
        padded = []
        for cell, width, to_the_right in zip(cells, widths, right, strict=True):
            space = " " * (width - _width(cell))
            padded.append(space + cell if to_the_right else cell + space)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else one_line(str(value))


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _best(similarities: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.argsort(-similarities, kind="stable")[:LISTED]


def _best_videos(items: retrieval.Items, sentence: int) -> list[int]:
    """The best video of each of the best groups for one sentence, best first."""
    column = items.video_to_text[:, sentence]
    videos = []
    for group in _best(items.text_to_video[sentence]):
        members = np.flatnonzero(items.text_of_clip == group)
        videos.append(int(members[np.argmax(column[members])]))
    return videos


def _same_length(**columns: Sequence[str]) -> None:
    if len({len(column) for column in columns.values()}) != 1:
        found = ", ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise InputError(f"cannot report {found}; expected the same number of each")


def _merged(folder: Path, scores: Mapping[str, Any]) -> str:
    path = folder / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is no JSON object; expected earlier metrics, move it away to write new ones")
    for key in ("split", "index"):
        if key in found and key in scores and found[key] != scores[key]:
            raise InputError(
                f"{path} holds scores of {key} {found[key]}, these are of {scores[key]}; choose another folder"
            )
    return json.dumps({**found, **scores}, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _tsv(header: Sequence[str], rows: Any) -> str:
    return "".join("\t".join(_guarded(one_line(cell)) for cell in row) + "\n" for row in (header, *rows))


def _guarded(cell: str) -> str:
    """A space before anything that a spreadsheet would compute or a CSV reader would take for an opening quote.

    A space and not the usual apostrophe, because leading white space leaves every score as it is.
    """
    return f" {cell}" if cell[:1] in tuple('=+-@"') and not _PLAIN.fullmatch(cell) else cell


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
