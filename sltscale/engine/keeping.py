"""Which checkpoints stay: the newest few, and the best by a score on the dev split.

    checkpoints/scores.json     {"500": {"bleu4": 12.5, ...}, ...}: dev scores of the steps that were scored

The best is a function of that file, so a run that is killed and goes on keeps the same ones as a run left alone.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sltscale.config import BestSettings
from sltscale.engine import manifest
from sltscale.engine.faults import fault_point
from sltscale.engine.manifest import Checkpoint
from sltscale.errors import InputError
from sltscale.files import write_atomically


def read_scores(checkpoints: Path) -> dict[int, dict[str, float]]:
    """Dev scores by step; empty if there are none."""
    path = checkpoints / "scores.json"
    if not path.is_file():
        return {}
    try:
        return {int(step): dict(scores) for step, scores in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: no table of scores ({error}); remove it, best scores are then counted anew"
        ) from None


def note_scores(checkpoints: Path, step: int, scores: dict[str, Any], best: BestSettings | None) -> None:
    """Add the numbers among ``scores``. InputError if the one that ``best`` goes by is not among them."""
    numbers = {name: value for name, value in scores.items() if isinstance(value, int | float)}
    if best is not None and best.score not in numbers:
        raise InputError(
            f"train.keep_best.score {best.score!r} is no score of this method: {', '.join(sorted(numbers))}"
        )
    noted = read_scores(checkpoints) | {step: numbers}
    write_atomically(checkpoints / "scores.json", json.dumps({str(key): noted[key] for key in sorted(noted)}, indent=1))


def best_step(checkpoints: Path, best: BestSettings | None, until: int) -> int | None:
    """The step with the best score among those up to ``until``, the earliest of equals; None without scores."""
    if best is None:
        return None
    scored = {
        step: scores[best.score]
        for step, scores in read_scores(checkpoints).items()
        if step <= until and best.score in scores
    }
    sign = -1 if best.mode == "max" else 1
    return min(scored, key=lambda step: (sign * scored[step], step), default=None)


def prune(newest: Path, keep: int, best: int | None, damaged: Collection[str]) -> None:
    """Remove all checkpoints before ``newest`` but the last ``keep`` (``newest`` is one), the best, and never count on
    ``damaged`` ones. Newer folders stay: they can only be damaged ones that the run has gone back behind.

    A folder loses its name before its files, so that there is never half a checkpoint under a checkpoint's name.
    """
    step = int(newest.name.removeprefix("step-"))
    sound = [folder for folder in manifest.folders(newest.parent) if folder.name <= newest.name]
    sound = [folder for folder in sound if folder.name not in damaged]
    for old in sound[:-keep]:
        if old.name != f"step-{best or 0:08d}":
            doomed = old.rename(old.with_name(f"staging-removed-{old.name}"))
            fault_point("pruning", step)
            shutil.rmtree(doomed)


class ReadBack:
    """Verifies committed checkpoints in a thread while training goes on (rank 0), one at a time."""

    def __init__(self) -> None:
        self.damaged: set[str] = set()
        self._complaints: list[str] = []
        self._thread: threading.Thread | None = None

    def start(self, checkpoint: Checkpoint) -> None:
        self.wait()
        self._thread = threading.Thread(target=self._verify, args=(checkpoint.folder,), daemon=True)
        self._thread.start()

    def wait(self) -> list[str]:
        """Until the checkpoint given last is verified; the complaints since the last call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        complaints, self._complaints = self._complaints, []
        return complaints

    def _verify(self, folder: Path) -> None:
        try:
            manifest.verify(folder)
        except InputError as error:
            self.damaged.add(folder.name)
            self._complaints.append(str(error))
