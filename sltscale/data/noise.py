"""Sentences with words masked, which GFSLT-VLP's text decoder learns to restore.

zhoubenjia/GFSLT-VLP@91ba953 utils.py (NoiseInjecting, sampler_func). Each masked word becomes one "<mask>", however
many tokens it had.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Literal

import numpy as np

MASK = "<mask>"
UNSPACED = ("zh", "ja")  # languages written without spaces between words


def sentence_generator(seed: int, step: int, clip: str) -> np.random.Generator:
    """The source of all random choices for the sentence of the clip with that id in one step."""
    digest = hashlib.blake2b(clip.encode(), digest_size=8).digest()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(step, *digest))))


def sampling_seeds(seed: int, clip: str, n: int) -> list[int]:
    """Of the n sentences that are drawn for the clip with that id."""
    return [int(sentence_generator(seed, number, clip).integers(2**63)) for number in range(n)]


def mask_words(
    text: str,
    language: str,
    rng: np.random.Generator,
    *,
    noise: Literal["omit_last", "omit"] = "omit_last",
    rate: float = 0.15,
    shuffle: bool = False,
) -> str:
    """``text`` with at least one of its n words masked, if it has any.

    omit_last: the last ceil(n u) words, u uniform from 0 to ``rate``. omit: all but int(n (1 - rate)) words, one kept
    at random out of each of as many consecutive pieces of the sentence. shuffle: with probability 1/2 the words, masks
    included, come in random order. Words are what spaces part; a text of a language (BCP-47) that is written without
    spaces, and has none, is parted into characters.
    """
    spaced = len(text.split()) > 1 or language.replace("_", "-").split("-")[0].lower() not in UNSPACED
    words = text.split() if spaced else list(text.strip())
    kept = _kept(len(words), noise, rate, rng)
    words = [word if place in kept else MASK for place, word in enumerate(words)]
    if shuffle and rng.random() < 0.5:
        rng.shuffle(words)
    return (" " if spaced else "").join(words)


def _kept(count: int, noise: Literal["omit_last", "omit"], rate: float, rng: np.random.Generator) -> set[int]:
    """Places of the words that are not masked."""
    if noise == "omit_last":
        return set(range(count - max(1, math.ceil(count * rng.uniform(0, rate)))))
    kept = int(count * (1 - rate))
    bounds = [piece * count // kept for piece in range(kept + 1)] if kept else []
    return {int(rng.integers(begin, end)) for begin, end in itertools.pairwise(bounds)}
