"""An encoder with drawn weights, and tiny recipes that write its features and read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_recipes import Corpus

from sltscale.config import Recipe
from sltscale.data.shards.index import open_index
from sltscale.data.text import build_corpus_tokenizer
from sltscale.methods import export
from sltscale.recipe_files import load_recipe

FEATURES = """
base = "tiny.toml"
name = "tiny_features"
[start]
run = "{encoder}"
[data]
augment = "off"
[method]
name = "features"
folder = "{features}"
clips_per_shard = 7
"""
READING = """
base = "tiny.toml"
name = "tiny_{name}_on_features"
[start]
recipe = "{recipe}"
[data]
augment = "off"
features = "{features}"
[method]
name = "{name}"
{model}
"""
TRANSLATION = """
[method.language_model]
width = 16
encoder_layers = 1
decoder_layers = 1
heads = 2
feed_forward = 32
max_positions = 128
"""
RETRIEVAL = """
[method.encoder]
layers = 1
width = 24
heads = 2
feed_forward = 32
max_positions = 128
"""


@dataclass(frozen=True)
class FeatureRecipes:
    """encoder: the run that features are made with. features: where they go. write, translate, retrieve: recipes."""

    encoder: Path
    features: Path
    write: Path
    translate: Path
    retrieve: Path


def write_feature_recipes(corpus: Corpus, folder: Path, seed: int = 5) -> FeatureRecipes:
    """In ``folder``; with the export of a pretraining that has not learnt anything, whose every tensor is drawn."""
    recipe = load_recipe(str(corpus.pretrain))
    train = open_index(corpus.shards, "train")
    tokenizer = build_corpus_tokenizer(train.texts(), train.languages(), recipe.text.vocabulary)
    method = export.build(recipe.model_copy(update={"seed": seed}), tokenizer)
    tensors = export.tensors(method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith("visual") and name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.1, generator=generator)
    export.save_export(folder / "encoder/export", recipe, dict(tensors), tokenizer)
    (folder / "tiny.toml").write_text((corpus.pretrain.parent / "tiny.toml").read_text())
    made = FeatureRecipes(
        folder / "encoder", folder / "features", *(folder / f"{n}.toml" for n in ("write", "translate", "retrieve"))
    )
    made.write.write_text(FEATURES.format(encoder=made.encoder, features=made.features))
    for path, name, model in ((made.translate, "translation", TRANSLATION), (made.retrieve, "retrieval", RETRIEVAL)):
        path.write_text(READING.format(name=name, recipe=made.write, features=made.features, model=model))
    return made


def on_video(path: Path, recipes: FeatureRecipes, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in ``path`` without stored features: the same encoder, frozen, reads the clips anew."""
    given = ["--data.features", "none", "--start.recipe", "none", "--start.run", str(recipes.encoder)]
    return load_recipe(str(path), [*given, "--optim.groups", '[{part = "visual", frozen = true}]', *overrides])
