"""Finished weights as a folder for exchange, and starting one model from parts of another.

model.safetensors   fp32 weights and buffers, by name       config.json   the resolved recipe
tokenizer/          a transformers tokenizer
lexicon/            the pseudo-glosses, where the method learns them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sltscale import config
from sltscale.data.lexicon import Lexicon, load_lexicon
from sltscale.data.text import TextTokenizer, load_tokenizer
from sltscale.errors import InputError
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.methods.hfa import HFAPretraining
from sltscale.models.visual import StoredTokens
from sltscale.recipe_files import recipe_from_json

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Exported:
    recipe: config.Recipe
    tokenizer: TextTokenizer
    method: Method


def build(recipe: config.Recipe, tokenizer: TextTokenizer, lexicon: Lexicon | None = None) -> Method:
    """The recipe's method with freshly drawn weights: the same for the same seed, on every rank; without its visual
    encoder where the recipe reads features (``Recipe.on_video`` has it)."""
    torch.manual_seed(recipe.seed)
    method = build_method(recipe.method, vocabulary(tokenizer, lexicon), stored_tokens=recipe.data.features is not None)
    if isinstance(method, HFAPretraining) and lexicon is not None:
        method.use_lexicon(lexicon)
    return method


def vocabulary(tokenizer: TextTokenizer, lexicon: Lexicon | None) -> Vocabulary:
    """What a method is told of the two."""
    pseudo_glosses = 0 if lexicon is None else len(lexicon)
    ids = (tokenizer.size, tokenizer.pad_id, tokenizer.eos_id)
    return Vocabulary(*ids, pseudo_glosses, tokenizer.prompts, tokenizer.start)


def save_export(
    folder: Path,
    recipe: config.Recipe,
    weights: dict[str, Tensor],
    tokenizer: TextTokenizer,
    lexicon: Lexicon | None = None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(recipe.to_json())
    tokenizer.save(folder / "tokenizer")
    if lexicon is not None:
        lexicon.save(folder / "lexicon")
    _save_weights(folder, weights)


def save_part(folder: Path, recipe: config.Recipe, weights: dict[str, Tensor]) -> None:
    """Some of a model's weights, for other recipes to start from."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(recipe.to_json())
    _save_weights(folder, weights)


def _save_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(weights, temporary)
    temporary.replace(folder / WEIGHTS)  # last: its presence means that the folder is complete


def load_export(folder: Path, device: torch.device | str = "cpu") -> Exported:
    """Model in evaluation mode; InputError if the folder is incomplete or the weights do not fit its configuration."""
    for name in ("config.json", "tokenizer", WEIGHTS):
        if not (folder / name).exists():
            raise InputError(f"{folder} holds no {name}; expected a folder written at the end of a training run")
    recipe = recipe_from_json((folder / "config.json").read_text(), str(folder / "config.json"))
    tokenizer = load_tokenizer(str(folder / "tokenizer"), recipe.text.max_tokens, recipe.prompts)
    lexicon = load_lexicon(folder / "lexicon") if (folder / "lexicon").is_dir() else None
    method = build(recipe, tokenizer, lexicon)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read ({error}); export the run again") from None
    load_weights(method, weights, str(folder))
    return Exported(recipe, tokenizer, method.to(device).eval())


def load_weights(module: nn.Module, weights: dict[str, Tensor], where: str, fresh: Sequence[str] = ()) -> None:
    """Load every weight, none missing, none left over; InputError says what differs, with the first of each kind.

    Tied parameters stand in ``weights`` once, under the first of their names. fresh: submodules and parameters that
    are left as they are, whatever ``weights`` holds of them.
    """
    own = {name: tensor for name, tensor in tensors(module).items() if not _inside(name, fresh)}
    weights = {name: tensor for name, tensor in weights.items() if not _inside(name, fresh)}
    shapes = [
        f"{name} {list(weights[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    differences = {
        "missing": sorted(own.keys() - weights.keys()),
        "left over": sorted(weights.keys() - own.keys()),
        "of another shape": shapes,
    }
    wrong = [f"{what} {_first(names)}" for what, names in differences.items() if names]
    if wrong:
        raise InputError(f"{where}: weights do not fit the model: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and buffers that are state, by name."""
    return dict(module.named_parameters()) | persistent_buffers(module)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are state (running statistics), by name; constants are left out."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, owner in module.named_modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if name not in owner._non_persistent_buffers_set
    }


def transfer(method: Method, folder: Path, parts: Sequence[str], fresh: Sequence[str] = ()) -> None:
    """Start the submodules ``parts`` of ``method`` from those of a finished folder, see ``StartSettings``; not the
    visual encoder of a run that reads its tokens from files."""
    path = folder / WEIGHTS
    for name in fresh:
        if not any(_inside(own, (name,)) for own in _all_names(method)):
            raise InputError(f"start.fresh: the model holds nothing called {name}")
    if not path.is_file():
        raise InputError(f"start: {folder} holds no {WEIGHTS}; finish that run first")
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"start: {path} cannot be read ({error})") from None
    with file:
        names = list(file.keys())
        for part in parts:
            theirs, _, ours = (name.strip() for name in part.partition("->"))
            ours = ours or theirs
            prefix = f"{theirs}."
            weights = {name[len(prefix) :]: file.get_tensor(name) for name in names if name.startswith(prefix)}
            if not weights:
                available = sorted({name.split(".")[0] for name in names})
                raise InputError(f"start.parts: {folder} holds no part {theirs}; it holds {', '.join(available)}")
            try:
                module = method.get_submodule(ours)
            except AttributeError:
                own = [name for name, _ in method.named_children()]
                raise InputError(f"start.parts: the model has no part {ours}; it has {', '.join(own)}") from None
            if isinstance(module, StoredTokens):
                continue  # the run keeps these weights beside its checkpoints
            inside = [name.removeprefix(f"{ours}.") for name in fresh if name.startswith(f"{ours}.")]
            load_weights(module, weights, f"start: {folder} (method {_method_of(folder)}), part {part}", inside)


def _method_of(folder: Path) -> str:
    """For an error message, so whatever the file is like."""
    try:
        return str(json.loads((folder / "config.json").read_text())["method"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _inside(name: str, parts: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _all_names(module: nn.Module) -> set[str]:
    """Also the second names of tied parameters."""
    return {name for name, _ in module.named_parameters(remove_duplicate=False)} | persistent_buffers(module).keys()
