"""The visual encoder of a finished run, apart from the rest of its model: what features are made with.

A run that reads features keeps the encoder that wrote them beside its checkpoints, so that what it exports is whole.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sltscale.config import VisualSettings
from sltscale.errors import InputError
from sltscale.methods.export import WEIGHTS, load_weights
from sltscale.models.visual import VisualEncoder

PREFIX = "visual."
# Settings of a model that change nothing about what it makes of a clip.
INDIFFERENT = {"pretrained", "checkpoint_activations", "offload_activations", "dropout"}


def read_encoder(path: Path) -> dict[str, Tensor]:
    """Weights and buffers of ``visual`` by their names in the model, from an export folder or a file of
    ``save_encoder``; InputError if it cannot be read or holds none."""
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{path} holds no {WEIGHTS}; expected the export of a finished run with a visual encoder")
    try:
        weights = {name: tensor for name, tensor in load_file(file).items() if name.startswith(PREFIX)}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read ({error})") from None
    if not weights:
        raise InputError(f"{file} holds no visual encoder; start from a run that has one")
    return weights


def save_encoder(path: Path, weights: dict[str, Tensor]) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    save_file(weights, scratch)
    scratch.replace(path)


def encoder_digest(settings: VisualSettings, weights: dict[str, Tensor]) -> str:
    """sha256 (hex) of the encoder: of its weights and of the settings that say what is computed with them."""
    digest = hashlib.sha256(json.dumps(_telling(settings.model_dump(mode="json")), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        values = tensor.contiguous()
        digest.update(f"\n{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_encoder(settings: VisualSettings, weights: dict[str, Tensor], where: str) -> VisualEncoder:
    """In evaluation mode; InputError naming ``where`` if the weights do not fit the settings."""
    encoder = VisualEncoder(settings)
    load_weights(encoder, {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}, where)
    return encoder.eval()


def _telling(tree: object) -> object:
    if not isinstance(tree, dict):
        return tree
    return {name: _telling(value) for name, value in tree.items() if name not in INDIFFERENT}
