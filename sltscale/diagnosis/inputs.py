"""What a recipe takes from elsewhere: files of the Hugging Face hub, a lexicon, the run that it starts from."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from sltscale.config import HFAPretrainingSettings, Recipe, Settings
from sltscale.data.lexicon import load_lexicon
from sltscale.data.text import load_tokenizer
from sltscale.diagnosis.finding import Finding, State
from sltscale.methods.export import WEIGHTS

Files = tuple[tuple[str, ...], ...]
# One file out of each of these has to be there.
MODEL_FILES: Files = (("config.json",), ("model.safetensors", "model.safetensors.index.json"))
TOKENIZER_FILES: Files = (
    ("tokenizer_config.json", "config.json"),
    ("tokenizer.json", "sentencepiece.bpe.model", "spiece.model", "vocab.txt", "vocab.json"),
)


def hub_files(recipe: Recipe) -> Iterator[Finding]:
    """Models and tokenizer that the recipe names: are their files in the folder, or in the hub's cache of this host?"""
    wanted: list[tuple[str, str, Files]] = [
        (f"method.{key}", name, MODEL_FILES) for key, name in _pretrained(recipe.method)
    ]
    if recipe.text.tokenizer != "corpus":
        wanted.append(("text.tokenizer", recipe.text.tokenizer, TOKENIZER_FILES))
    if recipe.evaluation.bleurt is not None:
        wanted.append(("evaluation.bleurt", recipe.evaluation.bleurt, (*MODEL_FILES, ("tokenizer.json", "vocab.txt"))))
    for key, name, files in wanted:
        yield _files(key, name, files, recipe)
    if not wanted:
        yield Finding("hub files", "ok", "the recipe names none")


def starts(recipe: Recipe) -> Iterator[Finding]:
    """The run that first weights come from, and the lexicon."""
    if recipe.start is not None and recipe.start.run is not None:
        weights = Path(recipe.start.run) / "export" / WEIGHTS
        if weights.is_file():
            yield Finding("start.run", "ok", str(recipe.start.run))
        else:
            yield Finding("start.run", "fault", f"{weights} is missing", "finish that run first, or set start.recipe")
    method = recipe.method
    if isinstance(method, HFAPretrainingSettings) and method.pseudo_gloss > 0 and method.lexicon != "corpus":
        yield Finding("lexicon", "ok", f"{method.lexicon}: {len(load_lexicon(method.lexicon))} pseudo-glosses")


def _pretrained(settings: Settings) -> Iterator[tuple[str, str]]:
    """(key, folder or hub name) of every model in these settings."""
    for field, value in settings:
        if isinstance(value, Settings):
            yield from ((f"{field}.{key}", name) for key, name in _pretrained(value))
        elif field == "pretrained" and value is not None:
            yield field, value


def _files(key: str, name: str, files: Files, recipe: Recipe) -> Finding:
    folder = Path(name)
    if folder.is_dir():
        absent = [" or ".join(one) for one in files if not any((folder / file).is_file() for file in one)]
        if absent:
            return Finding(key, "fault", f"{name} lacks {', '.join(absent)}", "save the model there again")
    else:
        try:
            absent = [" or ".join(one) for one in files if not any(_cached(name, file) for file in one)]
        except HFValidationError:
            found = f"{name!r} is neither a folder nor a name on the hub"
            return Finding(key, "fault", found, f"give the folder, or OWNER/NAME, as --{key}")
        if absent:
            return _not_cached(key, name, absent, [one[0] for one in files])
    if files is TOKENIZER_FILES:
        load_tokenizer(name, recipe.text.max_tokens, recipe.prompts)
    return Finding(key, "ok", f"{name}: {'in its folder' if folder.is_dir() else 'in the cache of this host'}")


def _not_cached(key: str, name: str, absent: list[str], files: list[str]) -> Finding:
    """A start would fetch it where there is a network, which on compute nodes there mostly is not."""
    state: State = "fault" if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on") else "warning"
    found = f"{name} is not in the hub's cache of this host: {', '.join(absent)}"
    command = shlex.join(["hf", "download", name, *files])
    return Finding(key, state, found, f"where there is a network, with the same HF_HOME: {command}")


def _cached(name: str, file: str) -> bool:
    return isinstance(try_to_load_from_cache(name, file), str)
