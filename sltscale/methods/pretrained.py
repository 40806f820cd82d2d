"""Finished weights as a folder for exchange, and starting one model from parts of another.

model.safetensors   fp32 weights and buffers, by name       config.json   the resolved recipe
tokenizer/          a transformers tokenizer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sltscale import config
from sltscale.data.text import TextTokenizer, load_tokenizer
from sltscale.errors import InputError
from sltscale.methods.base import Method, Vocabulary, build_method

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Pretrained:
    recipe: config.Recipe
    tokenizer: TextTokenizer
    method: Method


def build(recipe: config.Recipe, tokenizer: TextTokenizer) -> Method:
    """The recipe's method with freshly drawn weights: the same for the same seed, on every rank."""
    torch.manual_seed(recipe.seed)
    return build_method(recipe.method, Vocabulary(tokenizer.size, tokenizer.pad_id, tokenizer.eos_id))


def save_pretrained(folder: Path, recipe: config.Recipe, weights: dict[str, Tensor], tokenizer: TextTokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(recipe.to_json())
    tokenizer.save(folder / "tokenizer")
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(weights, temporary)
    temporary.replace(folder / WEIGHTS)  # last: its presence means that the folder is complete


def load_pretrained(folder: Path, device: torch.device | str = "cpu") -> Pretrained:
    """Model in evaluation mode; InputError if the folder is incomplete or the weights do not fit its configuration."""
    for name in ("config.json", "tokenizer", WEIGHTS):
        if not (folder / name).exists():
            raise InputError(f"{folder} holds no {name}; expected a folder written at the end of a training run")
    recipe = config.recipe_from_json((folder / "config.json").read_text(), str(folder / "config.json"))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    method = build(recipe, tokenizer)
    load_weights(method, load_file(folder / WEIGHTS), str(folder))
    return Pretrained(recipe, tokenizer, method.to(device).eval())


def load_weights(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load every weight, none missing, none left over; InputError names the first that do not fit."""
    own = module.state_dict()
    wrong = sorted(own.keys() ^ weights.keys()) or [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own)
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{where}: weights do not fit the model: {', '.join(wrong[:3])}{more}")
    module.load_state_dict(weights)


def transfer(method: Method, folder: Path, parts: tuple[str, ...]) -> None:
    """Start the submodules ``parts`` of ``method`` from those of the same names in a finished folder."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"start: {folder} holds no {WEIGHTS}; finish that run first")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for part in parts:
            prefix = f"{part}."
            weights = {name[len(prefix) :]: file.get_tensor(name) for name in names if name.startswith(prefix)}
            if not weights:
                available = sorted({name.split(".")[0] for name in names})
                raise InputError(f"start.parts: {folder} holds no part {part}; it holds {', '.join(available)}")
            try:
                module = method.get_submodule(part)
            except AttributeError:
                own = [name for name, _ in method.named_children()]
                raise InputError(f"start.parts: the model has no part {part}; it has {', '.join(own)}") from None
            load_weights(module, weights, f"{folder}, part {part}")
