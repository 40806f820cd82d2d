"""A recipe made small by rule: what ``train.py --dry-run`` takes its two steps with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sltscale.config import C2RLSettings, Recipe, SyntheticSettings

STEPS = 2
CLIPS_PER_RANK = 2
FRAMES, CROP = 16, 56  # a clip's most frames; 56 pixels are a multiple of every patch and stride there is
SYNTHETIC = SyntheticSettings(clips=30, seed=1)
SYNTHETIC_SIZE = 72
# What a setting of a model's size is at most, by its name.
NARROW = {
    "width": 32,
    "output_width": 32,
    "feed_forward": 64,
    "heads": 2,
    "embedding_size": 8,
    "hidden_sizes": 8,
    "rank": 2,
    "image_size": 28,
}


def tiny_recipe(recipe: Recipe, ranks: int, drawn_shards: Path | None) -> Recipe:
    """The recipe with the same parts, rules and depth at small widths, without published weights, for STEPS steps of a
    few short clips, of video also where the recipe reads features. drawn_shards: where synthetic ones are, in place of
    the recipe's own."""
    tree = recipe.model_dump()
    data = tree["data"] | {
        "features": None,
        "max_frames": min(FRAMES, recipe.data.max_frames),
        "crop_size": min(CROP, recipe.data.crop_size),
        "global_batch": CLIPS_PER_RANK * ranks,
        "global_frames": None,
        "bucket_window": 0,
        "batch_multiple": 1,
        "micro_frames": None if recipe.data.micro_frames is None else 2 * FRAMES,
        "workers": min(1, recipe.data.workers),
    }
    method = _narrowed(tree["method"])
    own = recipe.method
    if isinstance(own, C2RLSettings) and own.text_encoder.width != own.visual.transformer.width:
        method["text_encoder"]["width"] = 2 * NARROW["width"]  # which takes a layer between the two
    if drawn_shards is not None:
        size = min(SYNTHETIC_SIZE, recipe.data.frame_size)
        drawn = {"shards": str(drawn_shards), "synthetic": SYNTHETIC.model_dump(), "mix": (), "frame_size": size}
        data |= drawn | {"crop_size": min(CROP, size)}
        method |= {"lexicon": "corpus"} if "lexicon" in method else {}
    train = tree["train"] | {"epochs": 1, "log_every": STEPS, "checkpoint_every": STEPS}
    train |= {"keep_best": None, "select": "last"}
    evaluation = tree["evaluation"] | {"every_epochs": None}
    return Recipe.model_validate(
        tree | {"start": None, "data": data, "method": method, "train": train, "evaluation": evaluation}
    )


def _narrowed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    narrow: dict[str, Any] = {}
    for name, value in tree.items():
        if name == "pretrained":
            narrow[name] = None
        elif name in NARROW and value is not None:
            narrow[name] = tuple(NARROW[name] for _ in value) if isinstance(value, tuple) else min(value, NARROW[name])
        else:
            narrow[name] = _narrowed(value)
    return narrow


def without_published_weights(recipe: Recipe) -> Recipe:
    """The recipe with the sizes that it gives itself, none taken from files."""

    def change(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        return {name: None if name == "pretrained" else change(branch) for name, branch in tree.items()}

    tree = recipe.model_dump()
    return Recipe.model_validate(tree | {"method": change(tree["method"])})
