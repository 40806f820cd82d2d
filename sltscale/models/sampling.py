"""Sentences drawn from a language model's probabilities, each with a seed of its own.

Letters: B sequences, T longest, n sentences of each, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from sltscale.models.decoding import Coupling, Hypothesis, scores_of, search


def sample(
    model: Any,
    coupling: Coupling,
    inputs: Tensor,
    mask: Tensor,
    language_ids: Tensor,
    *,
    seeds: Sequence[Sequence[int]],
    temperature: float,
    top_p: float,
    length_penalty: float,
    max_new_tokens: int,
) -> list[list[Hypothesis]]:
    """A sentence of each row of input vectors [B, T, D] with mask [B, T] for each of its seeds (B times n), likeliest
    first. What a seed draws does not depend on the other rows.

    temperature divides the logits; then tokens are left out that are not among the likeliest which make up ``top_p``.
    Scores are of the model's own probabilities.
    """
    n = len(seeds[0])
    values, valid, languages = (each.repeat_interleave(n, 0) for each in (inputs, mask, language_ids))
    found, generated = search(
        model,
        coupling,
        values,
        valid,
        languages,
        [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), _Noise([*chain.from_iterable(seeds)])],
        num_beams=1,
        max_new_tokens=max_new_tokens,
        output_logits=True,
    )
    written = [ids for (ids,) in found]
    scores = scores_of(model, written, generated, length_penalty)
    drawn = [Hypothesis(*pair) for pair in zip(written, scores, strict=True)]
    rows = [drawn[start : start + n] for start in range(0, len(drawn), n)]
    return [sorted(row, key=lambda one: -one.score) for row in rows]


class _Noise(LogitsProcessor):
    """Gumbel noise on every row's logits [rows, V], from the row's own generator: the largest sum is a draw from their
    softmax, so that what takes the likeliest token draws."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack(
            [torch.rand(scores.shape[1], dtype=torch.float64, generator=one) for one in self.generators]
        )
        return scores - (-uniform.log()).log().to(scores)
