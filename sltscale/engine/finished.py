"""From a run folder to a model that can be used: its export, or its newest checkpoint where there is none."""

from __future__ import annotations

from pathlib import Path

import torch

from sltscale.data.text import load_tokenizer
from sltscale.engine import checkpoint
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.methods import export


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_run(path: Path, device: torch.device) -> export.Exported:
    """The model of a run in evaluation mode.

    A finished run has its export; of one that is still under way (or was stopped) the newest good checkpoint is taken.
    InputError if ``path`` is no run folder or holds neither.
    """
    folder = RunFolder(path)
    recipe = folder.stored_recipe()
    if recipe is None:
        raise InputError(f"{path} is no run folder (no config.json); expected one written by training, e.g. runs/demo")
    if (folder.export / export.WEIGHTS).is_file():
        return export.load_export(folder.export, device)
    latest, complaints = checkpoint.latest_checkpoint(folder.checkpoints)
    if latest is None:
        why = f" ({complaints[0]})" if complaints else ""
        raise InputError(f"{path} holds no checkpoint{why}; train the run first")
    tokenizer = load_tokenizer(str(folder.tokenizer), max_tokens=recipe.text.max_tokens)
    method = export.build(recipe, tokenizer)
    export.load_weights(method, checkpoint.assemble(latest), str(latest.folder))
    return export.Exported(recipe, tokenizer, method.to(device).eval())
