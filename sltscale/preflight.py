"""The stages that a recipe takes, and what can be refused before anything is built."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sltscale import config
from sltscale.engine.finished import default_device
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.evaluation import retrieval, translation
from sltscale.evaluation.bleurt import load_bleurt
from sltscale.methods.attention import check_attention
from sltscale.recipe_files import nearest


@dataclasses.dataclass(frozen=True)
class Stage:
    """One recipe to run, its folder, and the finished run that its first weights come from."""

    recipe: config.Recipe
    folder: RunFolder
    starts_from: Path | None


def plan_stages(chain: Sequence[tuple[config.Recipe, Path]]) -> list[Stage]:
    """Of a ``recipe_chain``, in its order."""
    stages: list[Stage] = []
    for recipe, path in chain:
        if recipe.start is not None and recipe.start.run is not None:
            starts_from: Path | None = Path(recipe.start.run) / "export"
        else:  # where it starts from a recipe, that one's stage is the one before
            starts_from = stages[-1].folder.export if stages else None
        stages.append(Stage(recipe, RunFolder(path), starts_from))
    return stages


def check_stages(stages: list[Stage]) -> None:
    """InputError for a recipe or run folder that cannot be gone on with, as every rank finds; writes nothing."""
    for stage in stages:
        _check_best(stage.recipe)
        stage.folder.check(stage.recipe)
        if isinstance(stage.recipe.method, config.FeatureSettings) and stage.starts_from is None:
            raise InputError(f"recipe {stage.recipe.name}: method features takes its encoder from a run; set start")
    for before, stage in itertools.pairwise(stages):
        read, made = stage.recipe.data.features, before.recipe.method
        if isinstance(made, config.FeatureSettings) and read != made.folder:
            raise InputError(
                f"recipe {stage.recipe.name} has data.features {read}, but {before.recipe.name}, which it starts from, "
                f"writes {made.folder}; set it to that, or start from the recipe that trains the encoder"
            )
    first = stages[0].recipe.data
    for stage in stages:
        data = stage.recipe.data
        same = (data.synthetic, data.frame_size) == (first.synthetic, first.frame_size)
        if data.shards == first.shards and not same:
            raise InputError(
                f"recipes {stages[0].recipe.name} and {stage.recipe.name} want different clips in {data.shards}; "
                "tune data of the first one too, or give this one its own data.shards"
            )


def check_kernels(stages: list[Stage], deepspeed_json: dict[str, Any]) -> None:
    """InputError for an attention backend that this device has not, or not in the precision of the weights."""
    for stage in stages:
        check_attention(stage.recipe, default_device(), weights_dtype(deepspeed_json))


def check_bleurt(stages: list[Stage]) -> None:
    """InputError if a checkpoint that translations are to be scored by cannot be had; a collective."""
    for name in dict.fromkeys(stage.recipe.evaluation.bleurt for stage in stages):
        if name is not None:
            load_bleurt(name)


def _check_best(recipe: config.Recipe) -> None:
    """InputError if the best is looked for by a score that no evaluation gives."""
    best, two = recipe.train.keep_best, ["a b", "c d"]
    if best is None:
        return
    convention = recipe.evaluation.convention
    known = {
        **translation.score(two, two, language="en", convention=convention),
        "bleu4_shuffled": 0.0,
        **({} if recipe.evaluation.bleurt is None else {"bleurt": 0.0}),
        **retrieval.score_both(np.eye(2), two),
    }
    names = [name for name, value in known.items() if isinstance(value, int | float)]
    if best.score == "bleurt" and recipe.evaluation.bleurt is None:
        raise InputError(f'recipe {recipe.name}: train.keep_best.score "bleurt" needs evaluation.bleurt; set both')
    if best.score not in names:
        raise InputError(f"recipe {recipe.name}: train.keep_best.score {best.score!r}; {nearest(best.score, names)}")


def weights_dtype(deepspeed_json: dict[str, Any]) -> torch.dtype:
    """What the weights are in while they train."""
    return torch.bfloat16 if deepspeed_json.get("bf16", {}).get("enabled") else torch.float32
