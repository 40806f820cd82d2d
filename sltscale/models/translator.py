"""Sign video to text: visual encoder, linear projection, encoder-decoder language model.

Letters: B videos, N packed frames, T longest video, L text tokens, D the language model's width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sltscale.models.language import Hypothesis, beam_search, n_best
from sltscale.structures import Ragged


class Translator(nn.Module):
    """The parts of a translation model and the two ways of using them. ``logits`` for training under teacher forcing,
    ``generate`` for decoding. A method inherits it, so that the parts keep their names (``visual``,
    ``language_model``) from pretraining to translation.

    visual: Ragged uint8 frames -> Ragged [N', C]. projection: [N', C] -> [N', D], on valid steps only. language_model:
    of mBART's architecture.
    """

    def __init__(self, visual: nn.Module, projection: nn.Module, language_model: Any) -> None:
        super().__init__()
        self.visual, self.language_model, self.projection = visual, language_model, projection

    def logits(self, frames: Ragged, decoder_ids: Tensor) -> Tensor:
        """[B, L, V] for decoder inputs [B, L] that start with the language code."""
        values, mask = self._inputs(frames)
        logits: Tensor = self.language_model(
            inputs_embeds=values, attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
        ).logits
        return logits

    def generate(
        self, frames: Ragged, language_ids: Tensor, *, beams: int, length_penalty: float, max_new_tokens: int
    ) -> list[list[int]]:
        """Token ids of the best sentence per video, without special tokens, by beam search; the decoder starts from
        each video's language id (``language_ids`` [B])."""
        values, mask = self._inputs(frames)
        return beam_search(
            self.language_model,
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
            values,
            mask,
            language_ids,
            beams=beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            n=n,
        )

    def _inputs(self, frames: Ragged) -> tuple[Tensor, Tensor]:
        tokens = self.visual(frames)
        return tokens.with_values(self.projection(tokens.values)).to_padded()
