"""The grid file of a sweep: which recipes, values and seeds, combined or one by one.

    recipe = "demo"                    # or on the command line

    [grid]                             # every combination of these
    "optim.lr" = [1e-4, 3e-4]
    seed = [1, 2, 3]

    [[cells]]                          # and these
    name = "no-clipping"
    "optim.clip_norm" = "none"

Keys are those of recipes, values what would stand on the command line; the key ``recipe`` varies the recipe itself.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sltscale.errors import InputError
from sltscale.recipe_files import nearest

KEYS = ("recipe", "grid", "cells")
LONGEST_NAME = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. name: of its folder. values: what tells it from others, key and text. recipe: name or
    absolute path of the TOML file. overrides: as on the command line of training, those of all cells first."""

    name: str
    values: dict[str, str]
    recipe: str
    overrides: tuple[str, ...]


def read_grid(path: Path, recipe: str | None, overrides: Sequence[str]) -> list[Cell]:
    """The cells, in the order of the file, the last key varying fastest. overrides: for all cells.

    InputError in one line if the file cannot be read as above, names a cell twice, or leaves the recipe open.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"grid {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"grid {path}: not valid TOML: {error}") from None
    for key in tree:
        if key not in KEYS:
            raise InputError(f"grid {path}: unknown key {key}; {nearest(key, KEYS)}")
    if recipe is not None and tree.get("recipe", recipe) != recipe:
        raise InputError(f"grid {path} is one of recipe {tree['recipe']!r}, asked for is {recipe!r}; name one of them")
    recipe = recipe if recipe is not None else tree.get("recipe")
    chosen = [*_combinations(path, tree.get("grid", {})), *_single(path, tree.get("cells", []))]
    if not chosen:
        raise InputError(f"grid {path} holds no cells; expected a [grid] with lists of values, or [[cells]]")
    cells = [_cell(path, name, values, recipe, overrides) for name, values in chosen]
    seen: set[str] = set()
    for cell in cells:
        if cell.name in seen:
            raise InputError(f"grid {path}: two cells are called {cell.name}; remove one, or give it another name")
        seen.add(cell.name)
    return cells


def _combinations(path: Path, tree: Any) -> list[tuple[str | None, dict[str, Any]]]:
    axes = _flat(tree) if isinstance(tree, dict) else None
    if axes is None:
        raise InputError(f"grid {path}: [grid] is no table of keys with lists of values")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise InputError(f'grid {path}: grid.{key} is {values!r}; expected a list of values, e.g. "{key}" = [1, 2]')
    if not axes:
        return []
    return [(None, dict(zip(axes, chosen, strict=True))) for chosen in itertools.product(*axes.values())]


def _single(path: Path, cells: Any) -> list[tuple[str | None, dict[str, Any]]]:
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise InputError(f"grid {path}: cells: expected [[cells]], a table for each cell")
    single = []
    for cell in cells:
        name = cell.get("name")
        if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name) and len(name) <= LONGEST_NAME):
            raise InputError(f"grid {path}: cell name {name!r}; expected letters, digits and . _ + = , - only")
        single.append((name, _flat({key: value for key, value in cell.items() if key != "name"})))
    return single


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """TOML takes an unquoted optim.lr apart; both spellings mean the same."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _cell(path: Path, name: str | None, chosen: dict[str, Any], default: str | None, overrides: Sequence[str]) -> Cell:
    values = {key: _text(value) for key, value in chosen.items()}
    recipe = values.get("recipe", default)
    if recipe is None:
        raise InputError(f"grid {path} names no recipe; set recipe in it, or give one on the command line")
    tuned = [part for key, text in values.items() if key != "recipe" for part in (f"--{key}", text)]
    if recipe.endswith(".toml"):
        recipe = str(Path(recipe).absolute())
    return Cell(name or _name(values), values, recipe, (*overrides, *tuned))


def _text(value: Any) -> str:
    """A value as it stands on the command line, where text is TOML where it can be."""
    return value if isinstance(value, str) else _toml(value)


def _toml(value: Any) -> str:
    """In one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _name(values: dict[str, str]) -> str:
    """Of the values alone, so that a cell keeps its folder whatever the grid grows by."""
    parts = [Path(text).stem if key == "recipe" else f"{key}={text}" for key, text in values.items()]
    exact = "_".join(parts)
    plain = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", exact)
    if plain == exact and len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[:LONGEST_NAME]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
