"""mT5 (arXiv 2010.11934), and how it reads visual tokens and writes sentences.

Letters: B sentences, T visual tokens, L text tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import MT5Config, MT5ForConditionalGeneration

from sltscale.config import MT5Settings
from sltscale.errors import InputError
from sltscale.models.decoding import Coupling, decoding_by_the_recipe, encoded
from sltscale.models.language import Vocabulary, check_heads
from sltscale.models.memory import checkpoint_blocks
from sltscale.models.pretrained import load_pretrained
from sltscale.structures import TextBatch


class MT5Coupling(Coupling):
    """The encoder reads visual tokens; the decoder starts from padding, as mT5's does, and is told no language."""

    def logits(self, model: Any, values: Tensor, mask: Tensor, text: TextBatch) -> Tensor:
        ids, _ = text.without_language(self.vocabulary.pad_id)
        inputs = ids.roll(1, 1)
        inputs[:, 0] = self.vocabulary.pad_id
        logits: Tensor = model(
            inputs_embeds=values, attention_mask=mask, decoder_input_ids=inputs, use_cache=False
        ).logits
        return logits

    def started(self, model: Any, values: Tensor, mask: Tensor, language_ids: Tensor) -> dict[str, Any]:
        return encoded(model, values, mask) | {"decoder_start_token_id": self.vocabulary.pad_id}


def build_mt5(settings: MT5Settings, vocabulary: Vocabulary) -> MT5ForConditionalGeneration:
    """Random weights of the settings' sizes, or ``settings.pretrained`` (sizes from there, dropout from the settings).

    InputError if the weights cannot be had, or if their vocabulary is not the tokenizer's.
    """
    if settings.pretrained is None:
        check_heads(settings.width, settings.heads)
        model = MT5ForConditionalGeneration(
            MT5Config(
                vocab_size=vocabulary.size,
                pad_token_id=vocabulary.pad_id,
                eos_token_id=vocabulary.eos_id,
                decoder_start_token_id=vocabulary.pad_id,
                d_model=settings.width,
                d_kv=settings.width // settings.heads,
                d_ff=settings.feed_forward,
                num_layers=settings.encoder_layers,
                num_decoder_layers=settings.decoder_layers,
                num_heads=settings.heads,
                dropout_rate=settings.dropout,
                tie_word_embeddings=False,
            )
        )
    else:
        model = load_pretrained(MT5ForConditionalGeneration, settings.pretrained, dropout_rate=settings.dropout)
        found = model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id
        if vocabulary.size > found[0] or found[1:] != (vocabulary.pad_id, vocabulary.eos_id):
            raise InputError(
                f"language model {settings.pretrained!r} has {found[0]} token ids, padding {found[1]} and end "
                f"{found[2]}; the tokenizer has {vocabulary.size}, {vocabulary.pad_id} and {vocabulary.eos_id}: "
                f"set text.tokenizer to the tokenizer that belongs to the model"
            )
    checkpoint_blocks([*model.encoder.block, *model.decoder.block], settings)
    return decoding_by_the_recipe(model, vocabulary)
