"""Sign video to text: visual encoder, linear projection, language model.

Letters: B videos, N packed frames, T longest video, L text tokens, D the language model's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from sltscale.models.decoding import Coupling, Hypothesis, beam_search, n_best
from sltscale.models.sampling import sample
from sltscale.structures import Ragged, TextBatch


class Translator(nn.Module):
    """The parts of a translation model and the two ways of using them. ``logits`` for training under teacher forcing,
    ``generate`` for decoding. A method inherits it, so that the parts keep their names (``visual``,
    ``language_model``) from pretraining to translation.

    visual: Ragged uint8 frames -> Ragged [N', C]. projection: [N', C] -> [N', D], on valid steps only. language_model:
    of transformers. coupling: how the two go together.
    """

    def __init__(self, visual: nn.Module, projection: nn.Module, language_model: Any, coupling: Coupling) -> None:
        super().__init__()
        self.visual, self.language_model, self.projection = visual, language_model, projection
        self.coupling = coupling

    def logits(self, frames: Ragged, text: TextBatch) -> Tensor:
        """[B, L, V] under teacher forcing, where the coupling has labels."""
        values, mask = self._inputs(frames)
        return self.coupling.logits(self.language_model, values, mask, text)

    def generate(
        self, frames: Ragged, language_ids: Tensor, *, beams: int, length_penalty: float, max_new_tokens: int
    ) -> list[list[int]]:
        """Token ids of the best sentence per video, without special tokens, by beam search, in the languages of the
        ids [B]."""
        values, mask = self._inputs(frames)
        return beam_search(
            self.language_model,
            self.coupling,
            values,
            mask,
            language_ids,
            beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
        )

    def n_best(
        self, frames: Ragged, language_ids: Tensor, *, beams: int, length_penalty: float, max_new_tokens: int, n: int
    ) -> list[list[Hypothesis]]:
        """As ``generate``, the n best sentences of each video with their scores, best first."""
        values, mask = self._inputs(frames)
        return n_best(
            self.language_model,
            self.coupling,
            values,
            mask,
            language_ids,
            beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            n=n,
        )

    def sample(
        self,
        frames: Ragged,
        language_ids: Tensor,
        *,
        seeds: Sequence[Sequence[int]],
        temperature: float,
        top_p: float,
        length_penalty: float,
        max_new_tokens: int,
    ) -> list[list[Hypothesis]]:
        """A drawn sentence of each video for each of its seeds, likeliest first; see ``models.sampling.sample``."""
        values, mask = self._inputs(frames)
        return sample(
            self.language_model,
            self.coupling,
            values,
            mask,
            language_ids,
            seeds=seeds,
            temperature=temperature,
            top_p=top_p,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
        )

    def _inputs(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        tokens = self.visual(frames)
        return tokens.with_values(self.projection(tokens.values)).to_padded()
