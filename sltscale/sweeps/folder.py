"""The folder of a sweep.

    DIR/sweep.json            what is run in which cell; the number of a cell is its place there and never changes
    DIR/CELL/RECIPE/          run folder of the cell, beside it those of the recipes that it starts from
    DIR/CELL/failed.json      why the last start failed, if it did
    DIR/table.tsv, table.md   results, by ``sltscale sweep table``

Nothing else is kept: whether a cell is finished, running or broken is read from its run folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from sltscale.config import Recipe
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.files import write_atomically
from sltscale.recipe_files import load_recipe, recipe_chain
from sltscale.sweeps.grid import Cell

NAME = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """deepspeed: engine settings of all cells, a path."""

    folder: Path
    deepspeed: str
    cells: tuple[Cell, ...]

    def cell(self, number: int) -> Cell:
        """InputError if there is no such cell."""
        if not 0 <= number < len(self.cells):
            raise InputError(f"{self.folder} holds cells 0 to {len(self.cells) - 1}, there is no cell {number}")
        return self.cells[number]

    def run(self, cell: Cell) -> CellRun:
        return CellRun(self.folder / cell.name, cell)

    def unfinished(self) -> list[int]:
        """Numbers of the cells that are neither finished nor being run."""
        runs = [self.run(cell) for cell in self.cells]
        return [number for number, run in enumerate(runs) if not run.finished and run.holder() is None]


@dataclass(frozen=True)
class CellRun:
    """A cell and where it is run."""

    path: Path
    cell: Cell

    @cached_property
    def stages(self) -> list[tuple[Recipe, RunFolder]]:
        """What is trained one after the other, the cell's own recipe last. InputError if that cannot be told."""
        recipe = load_recipe(self.cell.recipe, self.cell.overrides)
        chain = recipe_chain(self.cell.recipe, self.cell.overrides, self.path / recipe.name)
        return [(stage, RunFolder(path)) for stage, path in chain]

    @property
    def run_folder(self) -> RunFolder:
        return self.stages[-1][1]

    @property
    def failure(self) -> Path:
        return self.path / "failed.json"

    @property
    def finished(self) -> bool:
        return self.run_folder.status()["state"] == "finished"

    def holder(self) -> str | None:
        """Who trains the cell now, or a recipe that it starts from; None if nobody does."""
        return next((holder for _, folder in self.stages if (holder := folder.holder())), None)

    def arguments(self) -> list[str]:
        """Of training, but for --deepspeed."""
        return ["--recipe", self.cell.recipe, "--run", str(self.run_folder.path), *self.cell.overrides]


def plan(folder: Path, deepspeed: Path, cells: Sequence[Cell]) -> Sweep:
    """These cells as a sweep in ``folder``. If it holds one, those cells must be among them as they are and keep their
    numbers. Nothing is written.

    InputError for a cell that training would refuse, or that differs from the one that the folder holds.
    """
    folder = folder.absolute()
    known = open_sweep(folder).cells if (folder / NAME).exists() else ()
    planned = {cell.name: cell for cell in cells}
    for cell in known:
        if cell.name not in planned:
            raise InputError(f"{folder} holds cell {cell.name}, which the grid has not; choose another folder")
        if planned[cell.name] != cell:
            change = f"recipe {cell.recipe} {' '.join(cell.overrides)}"
            raise InputError(f"{folder} holds cell {cell.name} with {change}, not as asked for; choose another folder")
    there = {cell.name for cell in known}
    sweep = Sweep(folder, str(deepspeed.absolute()), (*known, *(cell for cell in cells if cell.name not in there)))
    for cell in sweep.cells:
        assert sweep.run(cell).stages
    return sweep


def write(sweep: Sweep) -> None:
    """Write DIR/sweep.json; InputError if that cannot be done."""
    content = {"deepspeed": sweep.deepspeed, "cells": [asdict(cell) for cell in sweep.cells]}
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(sweep.folder / NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"sweep folder {sweep.folder} cannot be written: {error.strerror}; choose another") from None


def open_sweep(folder: Path) -> Sweep:
    """InputError if there is no sweep in ``folder``."""
    folder = folder.absolute()
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        cells = [Cell(**(cell | {"overrides": tuple(cell["overrides"])})) for cell in content["cells"]]
        return Sweep(folder, content["deepspeed"], tuple(cells))
    except OSError:
        raise InputError(f"{folder} holds no {NAME}; expected the folder of a sweep, see sltscale sweep plan") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / NAME} is damaged ({error!r}); plan the sweep again from its grid") from None


def array(numbers: Sequence[int]) -> str:
    """Numbers, ascending, as sbatch --array takes them: "0-3,7"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
