"""How a recipe file becomes a configuration tree.

A recipe (``sltscale/recipes/*.toml`` or any TOML file) is one complete named run, with at most one ``base``; only one
that is nothing but another name for its base may have a base with a base. The command line tunes single values
(``--optim.lr 1e-4``). Unknown keys are refused with the nearest valid names.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from sltscale.config import Recipe, Settings
from sltscale.errors import InputError
from sltscale.language_settings import DEFAULT_ARCHITECTURE

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Files whose name starts with an underscore are bases for others, no recipes."""
    return sorted(path.stem for path in RECIPES.glob("[!_]*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name (or in that TOML file) with command-line overrides ``["--optim.lr", "1e-4", ...]``.

    Raises InputError in one line for an unknown recipe, key or value, with the nearest valid names.
    """
    path = _recipe_path(name_or_path)
    tree = _read_toml(path)
    base = tree.pop("base", None)
    if base is not None:
        base_path = _base_path(base, path, name_or_path)
        base_tree = _read_toml(base_path)
        if tree.keys() == {"name"} and "base" in base_tree:
            base_tree = _merge(_read_toml(_base_path(base_tree.pop("base"), base_path, name_or_path)), base_tree)
        if "base" in base_tree:
            raise InputError(
                f"recipe {name_or_path}: its base {base} has a base itself; a recipe may have one base only"
            )
        tree = _merge(base_tree, tree)
    for key, value in _parse_overrides(overrides):
        _set(tree, key, value)
    return _validate(tree, f"recipe {name_or_path}")


def recipe_chain(name_or_path: str, overrides: Sequence[str], run: Path | None) -> list[tuple[Recipe, Path]]:
    """What is trained, and where: the recipe last (in ``run``, or runs/NAME), before it the one it starts from, before
    that that one's; folders side by side. ``overrides`` tune the named recipe only.

    Raises InputError for recipes that start from each other, or would share a folder.
    """
    recipe = load_recipe(name_or_path, overrides)
    path = run or Path("runs") / recipe.name
    chain: list[tuple[Recipe, Path]] = []
    while True:
        names = sorted(later.name for later, _ in chain)
        if recipe.name in names:
            raise InputError(f"recipe {recipe.name} starts from itself by way of {', '.join(names)}")
        if any(path == folder for _, folder in chain):
            raise InputError(f"--run {path}: recipe {recipe.name}, which is trained first, would use the same folder")
        chain.insert(0, (recipe, path))
        if recipe.start is None or recipe.start.recipe is None:
            return chain
        recipe = load_recipe(recipe.start.recipe)
        path = path.parent / recipe.name


def check_ranks(chain: Sequence[tuple[Recipe, Path]], ranks: int) -> None:
    """InputError if there are more ranks than clips in a global batch. What else may be too few shows in the plan."""
    for recipe, _ in chain:
        most = recipe.data.global_batch
        if most is not None and ranks > most:
            raise InputError(
                f"{ranks} ranks, but recipe {recipe.name} has global batches of {most} clips, and every rank needs at "
                f"least one; start at most {most} ranks or raise data.global_batch"
            )


def recipe_from_json(text: str, where: str) -> Recipe:
    """A resolved recipe as stored in a run folder; InputError names ``where`` if it is not one."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not a stored configuration ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{where}: not a stored configuration (found {type(tree).__name__}, expected an object)")
    return _validate(tree, where)


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """Fields whose values differ, as "optim.lr 0.001 (run) / 0.01 (asked)"."""
    a, b = _flatten(ours.model_dump(mode="json")), _flatten(theirs.model_dump(mode="json"))
    missing = object()
    return [
        f"{key} {a.get(key, '-')} (run) / {b.get(key, '-')} (asked)"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def _recipe_path(name_or_path: str) -> Path:
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"recipe file {name_or_path} does not exist")
        return path
    path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file() or path.parent != RECIPES:
        raise InputError(f"unknown recipe {name_or_path!r}; {nearest(name_or_path, recipe_names())}")
    return path


def _base_path(base: Any, path: Path, name: str) -> Path:
    """Of the base of the recipe in ``path``."""
    if not isinstance(base, str):
        raise InputError(f"recipe {name}: base: expected a recipe name or TOML file, found {base!r}")
    return _recipe_path(str(path.parent / base) if base.endswith(".toml") else base)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def _parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise InputError(f"unexpected argument {option!r}; expected --key value, e.g. --optim.lr 1e-4")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"{option}: no value given; expected {option} VALUE")
            value = rest.pop(0)
        pairs.append((key, _parse_value(value)))
    return pairs


def _parse_value(text: str) -> Any:
    """A TOML value where it is one (1e-4, true, [1, 2]), ``none`` for no value, a plain string otherwise."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.get(parent)
        tree[parent] = child if isinstance(child, dict) else {}
        tree = tree[parent]
    tree[last] = value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        mergeable = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # Another architecture has other settings: of the base's nothing fits.
        mergeable = mergeable and value.get("architecture") in (None, _architecture(merged[key]))
        merged[key] = _merge(merged[key], value) if mergeable else value
    return merged


def _architecture(table: dict[str, Any]) -> Any:
    return table.get("architecture", DEFAULT_ARCHITECTURE)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def nearest(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(names)}"


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(_explain(e, tree) for e in error.errors())) from None


def _explain(error: Any, tree: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(_without_tags(path, tree))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}; {nearest(path[-1], _siblings(path))}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "union_tag_invalid":
        choices = [choice.strip(" '") for choice in error["ctx"]["expected_tags"].split(",")]
        return f"unknown {key} {error['ctx']['tag']!r}; {nearest(error['ctx']['tag'], choices)}"
    if error["type"] == "union_tag_not_found":
        return f"{key}.name is missing"
    if error["type"] == "value_error":  # our own validators, whose messages name what they found
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['msg']}, found {error['input']!r}"


def _without_tags(path: list[str], tree: Any) -> list[str]:
    """pydantic names the variant of a tagged union inside the path; the recipe's author has not written it there."""
    kept: list[str] = []
    for part in path:
        if kept and isinstance(tree, dict) and part not in tree and part in (tree.get("name"), _architecture(tree)):
            continue
        kept.append(part)
        tree = tree.get(part) if isinstance(tree, dict) else None
    return kept


def _siblings(path: list[str]) -> list[str]:
    """Valid keys at the place where the last part of a pydantic error path stands."""
    model: Any = Recipe
    for part in path[:-1]:
        fields = model.model_fields
        if part in fields:
            candidates = _settings_in(fields[part].annotation)
            model = candidates[0] if candidates else model
            variants = candidates
        else:
            model = next((v for v in variants if _tag(v) == part), model)
    return list(model.model_fields)


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _settings_in(argument)]


def _tag(model: type[Settings]) -> str | None:
    field = model.model_fields.get("name") or model.model_fields.get("architecture")
    choices = get_args(field.annotation) if field else ()
    return choices[0] if choices else None
