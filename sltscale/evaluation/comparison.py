"""Two runs on the same split: their scores with confidence intervals, and whether they differ by more than chance."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltscale.errors import InputError
from sltscale.evaluation.translation import Compared, compare


@dataclass(frozen=True)
class _Evaluation:
    """What an evaluation left behind (evaluation/report.py)."""

    folder: Path
    ids: list[str]
    references: list[str]
    hypotheses: list[str]
    language: str
    convention: str


def compare_runs(first: Path, second: Path, split: str, samples: int = 1000) -> tuple[dict[str, Compared], str]:
    """(``bleu4``, ``chrf`` and ``rouge_l`` of both, the convention that they are scored by).

    first, second: run folders, or folders that sltscale evaluate has written. InputError if one holds no translations
    of that split, or if the two are not of the same clips, sentences and convention.
    """
    one, two = _read(first, split), _read(second, split)
    for what, ours, theirs in (
        ("convention", one.convention, two.convention),
        ("language", one.language, two.language),
        ("number of clips", str(len(one.ids)), str(len(two.ids))),
    ):
        if ours != theirs:
            raise InputError(
                f"{one.folder} has {what} {ours}, {two.folder} {theirs}; compare runs evaluated alike on one split"
            )
    clips = zip(zip(one.ids, one.references, strict=True), zip(two.ids, two.references, strict=True), strict=True)
    for (our_id, our_text), (their_id, their_text) in clips:
        if (our_id, our_text) != (their_id, their_text):
            raise InputError(
                f"{one.folder} has clip {our_id} ({our_text}) where {two.folder} has {their_id} ({their_text}); "
                f"compare runs evaluated on the same shards"
            )
    convention, *more = one.convention.split("|")
    found = compare(
        one.hypotheses,
        two.hypotheses,
        one.references,
        language=one.language,
        convention=convention,  # type: ignore[arg-type]
        append_period="period:appended" in more,
        samples=samples,
    )
    return found, one.convention


def _read(run: Path, split: str) -> _Evaluation:
    folder = run / "evaluation" / split if (run / "evaluation").is_dir() else run
    try:
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with (folder / "hypotheses.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        evaluation = _Evaluation(
            folder,
            [row["id"] for row in rows],
            [row["reference"] for row in rows],
            [row["hypothesis"] for row in rows],
            metrics["language"],
            metrics["signature"]["convention"],
        )
        found = metrics["split"]
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no {Path(error.filename).name}; expected a run of a translation method, or a folder "
            f"written by sltscale evaluate"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} cannot be read ({error!r}); evaluate the run again") from None
    if found != split:
        raise InputError(f"{folder} holds scores of the split {found}, not {split}; choose it with --split")
    return evaluation
