"""From a run folder to a model that can be used: its export, or its newest checkpoint where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from sltscale.config import Recipe
from sltscale.data.lexicon import load_lexicon
from sltscale.data.text import load_tokenizer
from sltscale.engine import checkpoint, manifest
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.methods import export
from sltscale.methods.encoder import read_encoder


def default_device() -> torch.device:
    """A GPU if there is one and DS_ACCELERATOR does not say cpu, as it may to DeepSpeed."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda" if on_gpu else "cpu")


def _opened(path: Path) -> tuple[RunFolder, Recipe]:
    folder = RunFolder(path)
    recipe = folder.stored_recipe()
    if recipe is None:
        raise InputError(f"{path} is no run folder (no config.json); expected one written by training, e.g. runs/demo")
    return folder, recipe


def export_checkpoint(path: Path, step: int | None, out: Path) -> checkpoint.Checkpoint:
    """Write the weights of a run's checkpoint as a folder for exchange (methods/export.py): of ``step``, or the newest
    good one. InputError if there is none, it is damaged, or ``out`` is not empty."""
    folder, recipe = _opened(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; give --out a new folder")
    if step is None:
        chosen, _ = checkpoint.latest_checkpoint(folder.checkpoints)
    else:
        place = folder.checkpoints / f"step-{step:08d}"
        chosen = manifest.verify(place) if place.is_dir() else None
    if chosen is None:
        there = ", ".join(str(int(f.name.removeprefix("step-"))) for f in manifest.folders(folder.checkpoints))
        raise InputError(
            f"{path} holds no checkpoint{'' if step is None else f' of step {step}'}; there: {there or '-'}"
        )
    tokenizer = load_tokenizer(str(folder.tokenizer), recipe.text.max_tokens, recipe.prompts)
    lexicon = load_lexicon(folder.lexicon) if folder.lexicon.is_dir() else None
    export.save_export(out, recipe.on_video(), whole_weights(folder, chosen), tokenizer, lexicon)
    return chosen


def whole_weights(folder: RunFolder, committed: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint, with those of the visual encoder where the run reads its tokens from files: what
    ``Recipe.on_video`` asks for."""
    encoder = read_encoder(folder.encoder) if folder.encoder.is_file() else {}
    return {**checkpoint.assemble(committed), **encoder}


def load_run(path: Path, device: torch.device) -> export.Exported:
    """The model of a run in evaluation mode.

    A finished run has its export; of one that is still under way (or was stopped) the newest good checkpoint is taken.
    InputError if ``path`` is no run folder or holds neither.
    """
    folder, recipe = _opened(path)
    if (folder.export / export.WEIGHTS).is_file():
        return export.load_export(folder.export, device)
    latest, complaints = checkpoint.latest_checkpoint(folder.checkpoints)
    if latest is None:
        why = f" ({complaints[0]})" if complaints else ""
        raise InputError(f"{path} holds no checkpoint{why}; train the run first")
    tokenizer = load_tokenizer(str(folder.tokenizer), recipe.text.max_tokens, recipe.prompts)
    lexicon = load_lexicon(folder.lexicon) if folder.lexicon.is_dir() else None
    recipe = recipe.on_video()
    method = export.build(recipe, tokenizer, lexicon)
    export.load_weights(method, whole_weights(folder, latest), str(latest.folder))
    return export.Exported(recipe, tokenizer, method.to(device).eval())
