"""Whole models of mBART's architecture, and how they read visual tokens and write sentences.

Letters: B sequences, T longest, L text tokens, D width, V vocabulary. Masks are true (1) at valid steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MBartConfig, MBartForConditionalGeneration
from transformers.models.mbart.modeling_mbart import shift_tokens_right

from sltscale.config import LanguageModelSettings, TextDecoderSettings, TransformerSettings
from sltscale.errors import InputError
from sltscale.models.decoding import Coupling, decoding_by_the_recipe, encoded
from sltscale.models.language import (
    TransformerEncoder,
    Vocabulary,
    blocks_config,
    check_heads,
    load_mbart,
    start_embeddings,
)
from sltscale.models.memory import checkpoint_blocks
from sltscale.structures import TextBatch


def teacher_forcing(text: TextBatch, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """(decoder input ids [B, L], labels [B, L]) of sentences laid out as tokens, </s>, language code, padding.

    The decoder starts from the language code (mBART's shift: the last token moves to the front); labels are the
    un-shifted ids, -100 at padding, so that </s> and the language code after it are learnt too.
    """
    inputs = shift_tokens_right(text.input_ids, vocabulary.pad_id)
    return inputs, text.input_ids.masked_fill(text.attention_mask == 0, -100)


class MBartCoupling(Coupling):
    """The encoder reads visual tokens; the decoder starts from the language code, and learns it behind </s>.

    source_tokens: the encoder reads </s> and the language code behind them.
    """

    def __init__(self, vocabulary: Vocabulary, source_tokens: bool = False) -> None:
        super().__init__(vocabulary)
        self.source_tokens = source_tokens

    def labels(self, text: TextBatch) -> Tensor:
        return teacher_forcing(text, self.vocabulary)[1]

    def logits(self, model: Any, values: Tensor, mask: Tensor, text: TextBatch) -> Tensor:
        inputs, _ = teacher_forcing(text, self.vocabulary)
        values, mask = self._read(model, values, mask, inputs[:, 0])
        logits: Tensor = model(
            inputs_embeds=values, attention_mask=mask, decoder_input_ids=inputs, use_cache=False
        ).logits
        return logits

    def never_written(self, model: Any) -> list[int]:
        return []  # what mBART's own generation has it: padding, if it is written, ends the sentence

    def started(self, model: Any, values: Tensor, mask: Tensor, language_ids: Tensor) -> dict[str, Any]:
        values, mask = self._read(model, values, mask, language_ids)
        return encoded(model, values, mask) | {"decoder_start_token_id": language_ids.tolist()}

    def _read(self, model: Any, values: Tensor, mask: Tensor, language_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder reads of visual tokens [B, T, D], padded on the right, and their mask [B, T]."""
        if not self.source_tokens:
            return values, mask
        ids = torch.stack([torch.full_like(language_ids, self.vocabulary.eos_id), language_ids], 1)
        tokens = model.get_input_embeddings()(ids).to(values.dtype)
        places = mask.sum(1, keepdim=True) + torch.arange(2, device=mask.device)
        values = nn.functional.pad(values, (0, 0, 0, 2))
        values = values.scatter(1, places[..., None].expand_as(tokens), tokens)
        return values, nn.functional.pad(mask, (0, 2)).scatter(1, places, True)


def build_mbart(settings: LanguageModelSettings, vocabulary: Vocabulary) -> MBartForConditionalGeneration:
    """An mBART-architecture encoder-decoder: random weights of the settings' sizes, or ``settings.pretrained`` (sizes
    from there, dropout from the settings).

    InputError if the weights cannot be had, or if their vocabulary is not the tokenizer's.
    """
    if settings.pretrained is None:
        check_heads(settings.width, settings.heads)
        model = MBartForConditionalGeneration(
            MBartConfig(
                vocab_size=vocabulary.size,
                pad_token_id=vocabulary.pad_id,
                eos_token_id=vocabulary.eos_id,
                d_model=settings.width,
                encoder_layers=settings.encoder_layers,
                decoder_layers=settings.decoder_layers,
                encoder_attention_heads=settings.heads,
                decoder_attention_heads=settings.heads,
                encoder_ffn_dim=settings.feed_forward,
                decoder_ffn_dim=settings.feed_forward,
                dropout=settings.dropout,
                attention_dropout=settings.attention_dropout,
                activation_function=settings.activation,
                max_position_embeddings=settings.max_positions,
                init_std=settings.init_std,
                scale_embedding=True,
                forced_eos_token_id=None,
                attn_implementation="sdpa",
            )
        )
    else:
        model = load_mbart(
            settings.pretrained, vocabulary, dropout=settings.dropout, attention_dropout=settings.attention_dropout
        )
    checkpoint_blocks([*model.get_encoder().layers, *model.get_decoder().layers], settings)
    return decoding_by_the_recipe(model, vocabulary)


def build_encoder_decoder(
    encoder: TransformerSettings, decoder: TextDecoderSettings, vocabulary: Vocabulary
) -> MBartForConditionalGeneration:
    """Encoder of vectors and text decoder of one width, each of its own size (GFSLT-VLP). One token embedding, which
    only the decoder reads; the output layer is another matrix, freshly drawn, unless ``decoder.tied``.

    InputError if the widths differ, or an mBART that the decoder is to start from cannot be had or has other token ids.
    """
    mbart = None if decoder.pretrained is None else load_mbart(decoder.pretrained, vocabulary, dropout=decoder.dropout)
    if mbart is not None and decoder.start == "decoder":
        model = mbart
    else:
        config = blocks_config(decoder, vocabulary)
        config.encoder_layers, config.init_std = 0, decoder.init_std
        model = MBartForConditionalGeneration(config)
        if mbart is not None:
            start_embeddings(model.get_decoder(), mbart, decoder.pretrained)
    width = model.config.d_model
    if width != encoder.width:
        raise InputError(
            f"method.text_decoder's width is {width}, method.visual.transformer.width {encoder.width}; "
            f"the decoder attends to the encoder directly: set both to the same number"
        )
    model.model.encoder = TransformerEncoder(encoder).blocks
    checkpoint_blocks(model.get_decoder().layers, decoder)
    if not decoder.tied:
        model.lm_head = nn.Linear(width, vocabulary.size, bias=False)
        nn.init.normal_(model.lm_head.weight, std=decoder.init_std)
        model.config.tie_word_embeddings = False
    return decoding_by_the_recipe(model, vocabulary)
