"""How far the cells of a sweep are, and what came out: for the terminal, as TSV and as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sltscale.config import BestSettings, Recipe
from sltscale.engine.keeping import best_step, read_scores
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.files import write_atomically
from sltscale.sweeps.folder import CellRun, Sweep

# Of the test split's scores; on the dev split the first that there is counts, unless train.keep_best names one.
SCORES = ("bleu4", "chrf", "rouge_l", "t2v_recall@1", "v2t_recall@1")
LAST_BYTES = 1 << 16  # of steps.jsonl, more than its last line


@dataclass(frozen=True)
class Result:
    """state: waiting, running, stopped (goes on when it is started), broken (ended without a word), failed or done.

    why: who runs it, why it failed. steps: done of the cell's own recipe. dev: name, best value so far and its step.
    test: scores by name.
    """

    number: int
    run: CellRun
    state: str
    why: str
    steps: int
    dev: tuple[str, float, int] | None
    test: dict[str, float]


def results(sweep: Sweep) -> list[Result]:
    """Of every cell, by number."""
    return [_result(number, sweep.run(cell)) for number, cell in enumerate(sweep.cells)]


def status_rows(found: Sequence[Result]) -> list[list[object]]:
    """For ``evaluation.report.table``."""
    rows: list[list[object]] = [["cell", "", "state", "steps", "best dev score", "why"]]
    for one in found:
        dev = f"{one.dev[0]} {one.dev[1]:.2f} at step {one.dev[2]}" if one.dev else "-"
        rows.append([one.number, one.run.cell.name, one.state, one.steps, dev, one.why])
    return rows


def result_rows(found: Sequence[Result]) -> list[list[object]]:
    """A line for each cell: its values, best dev score and test scores; None where there is none."""
    keys = list(dict.fromkeys(key for one in found for key in one.run.cell.values))
    scores = [name for name in SCORES if any(name in one.test for one in found)]
    dev = list(dict.fromkeys(one.dev[0] for one in found if one.dev))
    rows: list[list[object]] = [["cell", *keys, "state", "steps", *(f"dev {name}" for name in dev), *scores]]
    for one in found:
        values = [one.run.cell.values.get(key) for key in keys]
        best = [one.dev[1] if one.dev and one.dev[0] == name else None for name in dev]
        rows.append([one.run.cell.name, *values, one.state, one.steps, *best, *(one.test.get(name) for name in scores)])
    return rows


def seed_rows(found: Sequence[Result]) -> list[list[object]]:
    """Test scores over the seeds of cells that differ in nothing else, as mean and standard deviation; empty if there
    are no such cells."""
    groups: dict[str, list[Result]] = {}
    for one in found:
        values = one.run.cell.values
        if one.test and "seed" in values:
            rest = ", ".join(f"{key} {text}" for key, text in values.items() if key != "seed")
            groups.setdefault(rest or one.run.cell.recipe, []).append(one)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    scores = [name for name in SCORES if any(name in one.test for group in groups.values() for one in group)]
    rows: list[list[object]] = [["over seeds", "n", *scores]] if groups else []
    for name, group in groups.items():
        rows.append(
            [name, len(group), *(_spread(one.test[score] for one in group if score in one.test) for score in scores)]
        )
    return rows


def write_tables(folder: Path, found: Sequence[Result]) -> None:
    """DIR/table.tsv, with every digit, and DIR/table.md. InputError if they cannot be written."""
    rows = result_rows(found)
    tsv = "".join("\t".join("" if cell is None else str(cell) for cell in row) + "\n" for row in rows)
    parts = [_markdown(rows)]
    if by_seed := seed_rows(found):
        parts.append(_markdown(by_seed))
    try:
        write_atomically(folder / "table.tsv", tsv)
        write_atomically(folder / "table.md", "\n".join(parts))
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}; copy it to where you may write") from None


def _result(number: int, run: CellRun) -> Result:
    recipe, folder = run.stages[-1]
    state, why = _state(run)
    test: dict[str, float] = {}
    with suppress(OSError, ValueError):
        if state == "done":
            metrics = json.loads((folder.path / "evaluation/test/metrics.json").read_text())
            test = {name: metrics[name] for name in SCORES if name in metrics}
    return Result(number, run, state, why, _steps(folder), _dev(recipe, folder), test)


def _state(run: CellRun) -> tuple[str, str]:
    if run.finished:
        return "done", ""
    stages = [(recipe.name, folder) for recipe, folder in run.stages if folder.path.is_dir()]
    for name, folder in stages:
        if holder := folder.holder():
            return "running", f"{name}: {holder}"
    status = max((_time(folder.path / "STATUS.json") for _, folder in stages), default=0.0)
    if run.failure.is_file() and _time(run.failure) >= status:
        failure = json.loads(run.failure.read_text())
        return "failed", f"{failure['reason']} (rank {failure['rank']} on {failure['host']}, {failure['start']})"
    if not stages:
        return "waiting", ""
    name, folder = next((one for one in stages if one[1].status()["state"] != "finished"), stages[-1])
    state = folder.status()["state"]
    if state == "stopped":
        return "stopped", f"{name}, by a signal"
    if state == "finished":
        return "waiting", f"{name} is finished"
    return "broken", f"{name}: its processes or their machine went without a word"


def _steps(folder: RunFolder) -> int:
    """From the last whole line of steps.jsonl."""
    with suppress(OSError), folder.steps.open("rb") as file:
        file.seek(max(0, folder.steps.stat().st_size - LAST_BYTES))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"]) + 1
    return 0


def _dev(recipe: Recipe, folder: RunFolder) -> tuple[str, float, int] | None:
    scores = read_scores(folder.checkpoints)
    names = SCORES if recipe.train.keep_best is None else (recipe.train.keep_best.score,)
    name = next((name for name in names if any(name in step for step in scores.values())), None)
    if name is None:
        return None
    best = recipe.train.keep_best or BestSettings(score=name)
    step = best_step(folder.checkpoints, best, max(scores))
    return None if step is None else (name, scores[step][name], step)


def _time(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _spread(values: Iterable[float]) -> str:
    numbers = list(values)
    deviation = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{deviation}" if numbers else "-"


def _markdown(rows: list[list[object]]) -> str:
    header, *body = [[_plain(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell).replace("|", "\\|")
