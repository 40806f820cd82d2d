"""Sentences from a language model, by transformers' beam search, whatever the model's architecture.

Letters: B sequences, T longest, L text tokens, D width, V vocabulary. Masks are true (1) at valid steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from sltscale.errors import InputError
from sltscale.models.language import Vocabulary
from sltscale.structures import TextBatch


class Coupling(ABC):
    """How visual tokens [B, T, D] with their mask [B, T], on the right of which padding is, and sentences go into a
    language model. Sentences come as tokens, </s>, language id, padding on the right."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def labels(self, text: TextBatch) -> Tensor:
        """[B, L] what is to be learnt, -100 where there is nothing: tokens and </s>."""
        ids, mask = text.without_language(self.vocabulary.pad_id)
        return ids.masked_fill(mask == 0, -100)

    @abstractmethod
    def logits(self, model: Any, values: Tensor, mask: Tensor, text: TextBatch) -> Tensor:
        """[B, L, V] under teacher forcing, where ``labels`` are."""

    def never_written(self, model: Any) -> list[int]:
        """Ids that ``generate`` is not to write: padding, and those that a published model has rows for, but the
        tokenizer no token."""
        padding = [] if self.vocabulary.pad_id == self.vocabulary.eos_id else [self.vocabulary.pad_id]
        return [*padding, *range(self.vocabulary.size, model.config.get_text_config().vocab_size)]

    @abstractmethod
    def started(self, model: Any, values: Tensor, mask: Tensor, language_ids: Tensor) -> dict[str, Any]:
        """What transformers' ``generate`` takes to write the sentences in the languages [B]."""


@dataclass(frozen=True)
class Hypothesis:
    """Token ids without special ones; the sum of their log probabilities, </s> among them, divided by their number to
    the power of the length penalty."""

    ids: list[int]
    score: float


def beam_search(
    model: Any,
    coupling: Coupling,
    inputs: Tensor,
    mask: Tensor,
    language_ids: Tensor,
    *,
    beams: int,
    length_penalty: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """The best sentence for each row of input vectors [B, T, D] with mask [B, T], by transformers' beam search.

    language_ids [B]: each row's. Returns token ids without language code, </s> and padding; at most
    ``max_new_tokens``. InputError if these are more than the model has positions for.
    """
    options: dict[str, Any] = {"num_beams": beams, "length_penalty": length_penalty, "max_new_tokens": max_new_tokens}
    return [ids for (ids,) in search(model, coupling, inputs, mask, language_ids, **options)[0]]


def n_best(
    model: Any,
    coupling: Coupling,
    inputs: Tensor,
    mask: Tensor,
    language_ids: Tensor,
    *,
    beams: int,
    length_penalty: float,
    max_new_tokens: int,
    n: int,
) -> list[list[Hypothesis]]:
    """The n best sentences of each row, best first; arguments as in ``beam_search``. Keeps every step's logits.

    InputError if there are not so many beams.
    """
    if n > beams:
        raise InputError(f"{n} sentences are wanted of {beams} beams; ask for fewer, or search with more beams")
    options: dict[str, Any] = {"num_beams": beams, "length_penalty": length_penalty, "max_new_tokens": max_new_tokens}
    found, generated = search(
        model,
        coupling,
        inputs,
        mask,
        language_ids,
        num_return_sequences=n,
        output_scores=beams > 1,
        output_logits=beams == 1,
        **options,
    )
    if beams > 1:
        scores = generated.sequences_scores.view(-1, n).tolist()
    else:
        scores = [[score] for score in scores_of(model, [ids for (ids,) in found], generated, length_penalty)]
    return [[Hypothesis(*pair) for pair in zip(*row, strict=True)] for row in zip(found, scores, strict=True)]


def scores_of(model: Any, found: list[list[int]], generated: Any, length_penalty: float) -> list[float]:
    """See Hypothesis; of what ``generate`` has written without beams, keeping the logits."""
    steps = model.compute_transition_scores(generated.sequences, generated.logits, normalize_logits=True)
    lengths = [min(len(ids) + 1, steps.shape[1]) for ids in found]
    return [float(row[:k].sum()) / k**length_penalty for row, k in zip(steps, lengths, strict=True)]


def encoded(model: Any, values: Tensor, mask: Tensor) -> dict[str, Any]:
    """What ``generate`` of an encoder-decoder takes of visual tokens; the encoder is run once for all beams."""
    hidden = model.get_encoder()(inputs_embeds=values, attention_mask=mask).last_hidden_state
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask.long()}


def decoding_by_the_recipe(model: Any, vocabulary: Vocabulary) -> Any:
    """Never by what a checkpoint's generation_config.json happens to say."""
    model.generation_config = GenerationConfig(pad_token_id=vocabulary.pad_id, eos_token_id=vocabulary.eos_id)
    return model


def positions_of(model: Any) -> int | None:
    """How long a sequence its decoder takes; none where positions are relative."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def search(
    model: Any,
    coupling: Coupling,
    inputs: Tensor,
    mask: Tensor,
    language_ids: Tensor,
    processors: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> tuple[list[list[list[int]]], Any]:
    """(ids of the sentences of each row, best first; what transformers' generate returned).

    processors: of every step's logits, after those of the options, which are a ``GenerationConfig``'s.
    """
    started = coupling.started(model, inputs, mask, language_ids)
    start = started.pop("decoder_start_token_id", None)
    read = started["inputs_embeds"].shape[1] if start is None else 0
    positions = positions_of(model)
    if positions is not None and read + options["max_new_tokens"] >= positions:
        beside = f"beside {read} steps of video and prompt " if read else ""
        raise InputError(
            f"evaluation.max_new_tokens {options['max_new_tokens']} does not fit {beside}"
            f"in the decoder's {positions} positions"
        )
    eos, pad = coupling.vocabulary.eos_id, coupling.vocabulary.pad_id
    generated = model.generate(
        **started,
        logits_processor=LogitsProcessorList(processors),
        generation_config=GenerationConfig(
            do_sample=False,
            decoder_start_token_id=start,
            eos_token_id=eos,
            pad_token_id=pad,
            suppress_tokens=coupling.never_written(model) or None,
            return_dict_in_generate=True,
            **options,
        ),
    )
    first = 0 if start is None else 1
    found = [_until(row[first:], eos, pad) for row in generated.sequences.tolist()]
    n = len(found) // len(inputs)
    return [found[row : row + n] for row in range(0, len(found), n)], generated


def _until(ids: list[int], *ends: int) -> list[int]:
    stop = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]
