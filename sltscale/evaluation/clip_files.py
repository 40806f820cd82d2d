"""Translate video files: those of a list or folder, a few at a time, so that clips of similar length go together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltscale.config import EvaluationSettings, Recipe
from sltscale.data.annotations.sources import VIDEO_SUFFIXES
from sltscale.data.batches.stream import load_video
from sltscale.data.noise import sampling_seeds
from sltscale.data.text import TextTokenizer
from sltscale.data.video.images import SUFFIXES as IMAGE_SUFFIXES
from sltscale.errors import InputError
from sltscale.models.translator import Translator
from sltscale.structures import Ragged

READ_AHEAD = 2  # batches in memory, whose clips are sorted by length


@dataclass(frozen=True)
class Sentence:
    """score: see models.language.Hypothesis, greater is likelier."""

    text: str
    score: float


@dataclass(frozen=True)
class Translated:
    """A video file and its best sentences, best first; or, in place of them, the fault that it has."""

    path: Path
    sentences: list[Sentence]
    fault: str | None = None


def clips_in(path: Path) -> list[Path]:
    """The clips that ``path`` stands for: those in a folder of video files and folders of images, by name; otherwise
    itself, a video file or folder of images, or what translate_files finds fault with."""
    try:
        if not path.is_dir() or _holds_images(path):
            return [path]
        found = sorted(
            inside
            for inside in path.iterdir()
            if inside.suffix.lower() in VIDEO_SUFFIXES or (inside.is_dir() and _holds_images(inside))
        )
    except OSError:
        found = []
    return found or [path]


def translate_files(
    method: Translator,
    tokenizer: TextTokenizer,
    recipe: Recipe,
    paths: Iterable[Path],
    language: str,
    device: torch.device,
    n: int = 1,
) -> Iterator[Translated]:
    """The n best sentences of each video file, in the files' order. A file that cannot be read is named with its fault,
    and the others go on.

    Files are read as ``paths`` gives them, a few batches ahead. InputError for a language that the tokenizer does not
    know, and more sentences than beams. Where sentences are sampled, a clip's are drawn by its path.
    """
    settings = recipe.evaluation
    language_id = tokenizer.language_id(language)
    if settings.sampling is None and n > settings.beams:
        raise InputError(f"{n} sentences are wanted of {settings.beams} beams; search with more beams")
    rest = iter(paths)
    while some := list(islice(rest, READ_AHEAD * settings.batch)):
        done: dict[int, Translated] = {}
        frames: dict[int, Tensor] = {}
        for number, path in enumerate(some):
            try:
                frames[number] = load_video(path, recipe.data)
            except InputError as error:
                done[number] = Translated(path, [], str(error))
        by_length = sorted(frames, key=lambda number: len(frames[number]))
        for start in range(0, len(by_length), settings.batch):
            batch = by_length[start : start + settings.batch]
            packed = Ragged.from_list([frames.pop(number) for number in batch]).to(device)
            seeds = [sampling_seeds(recipe.seed, ascii(os.fspath(some[number])), n) for number in batch]
            found = _n_best(method, tokenizer, settings, packed, language_id, seeds)
            done |= {number: Translated(some[number], best) for number, best in zip(batch, found, strict=True)}
        yield from (done[number] for number in range(len(some)))


@torch.inference_mode()
def _n_best(
    method: Translator,
    tokenizer: TextTokenizer,
    settings: EvaluationSettings,
    frames: Ragged,
    language_id: int,
    seeds: list[list[int]],
) -> list[list[Sentence]]:
    """seeds: of each clip, one for each of its sentences."""
    languages = torch.full((len(frames),), language_id, device=frames.values.device)
    lengths: dict[str, Any] = {"length_penalty": settings.length_penalty, "max_new_tokens": settings.max_new_tokens}
    if settings.sampling is not None:
        hypotheses = method.sample(frames, languages, seeds=seeds, **settings.sampling.model_dump(), **lengths)
    else:
        hypotheses = method.n_best(frames, languages, beams=settings.beams, n=len(seeds[0]), **lengths)
    texts = iter(tokenizer.decode([one.ids for row in hypotheses for one in row]))
    return [[Sentence(next(texts), one.score) for one in row] for row in hypotheses]


def _holds_images(folder: Path) -> bool:
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(folder))
