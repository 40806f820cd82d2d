"""All checks of ``sltscale doctor``, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sltscale.config import Recipe
from sltscale.data.clips import SPLITS
from sltscale.diagnosis import clips, disk, inputs, kernels, software
from sltscale.diagnosis.finding import Check, Finding, examine


def examination(recipe: Recipe | None, run: Path, shards: str | None) -> Iterator[Finding]:
    """Everything that a run needs, found sound or not. shards: in place of those of the recipe."""
    for subject, check in _checks(recipe, run, shards):
        yield from examine(subject, check)


def _checks(recipe: Recipe | None, run: Path, shards: str | None) -> Iterator[tuple[str, Check]]:
    yield "packages", software.packages
    yield "GPU", software.gpus
    yield "process group", software.process_group
    yield "DeepSpeed", software.deepspeed
    yield "compile locks", software.compile_locks
    yield "attention", partial(kernels.attention, recipe)
    yield "codecs", clips.codecs
    yield f"run folder {run}", partial(disk.use, run, recipe)
    yield f"run folder {run}", partial(disk.run_folder, run, recipe)
    data = None if recipe is None else recipe.data
    if shards is not None:
        yield f"shards {shards}", partial(clips.shards, shards, data, SPLITS if data else ())
    elif recipe is not None and recipe.data.features is not None:
        yield f"features {recipe.data.features}", partial(clips.features, recipe)
    elif data is not None:
        yield f"shards {data.shards}", partial(clips.shards, data.shards, data, SPLITS)
        for part in data.mix:
            yield f"shards {part.shards}", partial(clips.shards, part.shards, data, ("train",))
    if recipe is not None:
        yield "hub files", partial(inputs.hub_files, recipe)
        yield "start", partial(inputs.starts, recipe)
