"""A small synthetic corpus, packed with the real tools, and tiny recipes on it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TINY = """
seed = 5

[data]
shards = "{shards}"
frame_size = 32
crop_size = 28
sampling_rate = 0.25
max_frames = 100
global_batch = 8
workers = 1

[text]
vocabulary = 120

[method.visual.frames]
embedding_size = 4
hidden_sizes = [4, 8]
depths = [1, 1]

[method.visual.transformer]
layers = 1
width = 16
heads = 2
feed_forward = 32
max_positions = 128

[optim]
name = "adamw"
lr = 1e-3
clip_norm = 1.0

[train]
epochs = 3
log_every = 2
checkpoint_every = 4

[evaluation]
batch = 4
beams = 2
max_new_tokens = 12
"""
TOWER = "layers = 1\nwidth = 16\nheads = 2\nfeed_forward = 32\nmax_positions = 128\n"
PRETRAIN = f"""
base = "tiny.toml"
name = "tiny_pretrain"
[method]
name = "c2rl"
[method.text_encoder]
{TOWER}
[method.text_decoder]
{TOWER}
"""
TRANSLATE = """
base = "tiny.toml"
name = "tiny_translation"
[start]
recipe = "{folder}/pretrain.toml"
[method]
name = "translation"
[method.language_model]
width = 16
encoder_layers = 1
decoder_layers = 1
heads = 2
feed_forward = 32
max_positions = 128
"""


@dataclass(frozen=True)
class Corpus:
    source: Path
    shards: Path
    pretrain: Path
    translate: Path


def write_recipes(folder: Path, shards: Path) -> Corpus:
    (folder / "tiny.toml").write_text(TINY.format(shards=shards))
    (folder / "pretrain.toml").write_text(PRETRAIN)
    (folder / "translate.toml").write_text(TRANSLATE.format(folder=folder))
    return Corpus(folder / "source", shards, folder / "pretrain.toml", folder / "translate.toml")


def make_corpus(folder: Path, command: Callable[..., subprocess.CompletedProcess[str]]) -> Corpus:
    """60 clips; ``command`` runs a Python script."""
    drawn = command("tools/make_synthetic.py", "--out", folder / "source", "--clips", "60", "--seed", "2")
    assert drawn.returncode == 0, drawn.stderr
    packed = command(
        *("tools/make_shards.py", "--corpus", "openasl", "--annotations", folder / "source/annotations.tsv"),
        *("--videos", folder / "source/videos", "--out", folder / "shards", "--frame-size", "32", "--language", "de"),
    )
    assert packed.returncode == 0, packed.stderr
    return write_recipes(folder, folder / "shards")
