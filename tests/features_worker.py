"""Features of a recipe on the ranks of a launcher, or in one process: python features_worker.py RECIPE FOLDER [SHARDS].

With SHARDS, every rank kills itself (SIGKILL) when it has written so many of its shards.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from sltscale.config import FeatureSettings
from sltscale.data.batches.splits import open_splits
from sltscale.evaluation.features import write_features
from sltscale.methods.encoder import build_encoder, encoder_digest, read_encoder
from sltscale.recipe_files import load_recipe


def write(recipe_path: Path, folder: Path, kill_after: int | None = None, device: str = "cpu") -> None:
    recipe = load_recipe(str(recipe_path), ["--method.folder", str(folder), "--data.workers", "0"])
    assert isinstance(recipe.method, FeatureSettings) and recipe.start is not None and recipe.start.run is not None
    weights = read_encoder(Path(recipe.start.run) / "export")
    encoder = build_encoder(recipe.method.visual, weights, "here").to(device)
    splits, _ = open_splits(recipe.data)
    shards = 0

    def watch(what: str) -> None:
        nonlocal shards
        if shards == kill_after and what.startswith("shard"):
            os.kill(os.getpid(), signal.SIGKILL)
        shards += 1

    digest = encoder_digest(recipe.method.visual, weights)
    write_features(encoder, digest, recipe, recipe.method, splits, torch.device(device), watch)


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:
        from sltscale.engine.deepspeed_engine import start_processes

        start_processes()
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    write(Path(given[0]), Path(given[1]), int(given[2]) if given[2:] else None)
