"""Transformers over tokens: mBART-style encoder and decoder stacks, and whole mBART-architecture language models.

Letters: B sequences, T longest, L text tokens, D width, V vocabulary. Masks are true (1) at valid steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, MBartConfig, MBartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mbart.modeling_mbart import MBartDecoder, MBartEncoder, shift_tokens_right

from sltscale.config import LanguageModelSettings, TextDecoderSettings, TextEncoderSettings, TransformerSettings
from sltscale.errors import InputError
from sltscale.models.memory import checkpoint_blocks
from sltscale.models.pretrained import load_pretrained
from sltscale.structures import TextBatch


@dataclass(frozen=True)
class Vocabulary:
    """What a model has to know of the tokenizer: number of ids, and the ids of padding and end of sentence.

    pseudo_glosses: how many there are to learn, where the method learns them.
    """

    size: int
    pad_id: int
    eos_id: int
    pseudo_glosses: int = field(default=0, compare=False)


def teacher_forcing(text: TextBatch, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """(decoder input ids [B, L], labels [B, L]) of sentences laid out as tokens, </s>, language code, padding.

    The decoder starts from the language code (mBART's shift: the last token moves to the front); labels are the
    un-shifted ids, -100 at padding, so that </s> and the language code after it are learnt too.
    """
    inputs = shift_tokens_right(text.input_ids, vocabulary.pad_id)
    return inputs, text.input_ids.masked_fill(text.attention_mask == 0, -100)


class TransformerEncoder(nn.Module):
    """Vectors [B, T, D] and mask [B, T] -> [B, T, D]: mBART encoder blocks (learned positions, pre-norm, layer norm
    after the embedding and at the end), without a token embedding."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.blocks = MBartEncoder(_blocks_config(settings, Vocabulary(size=2, pad_id=1, eos_id=0)))
        checkpoint_blocks(self.blocks.layers, settings)
        del self.blocks.embed_tokens  # never read when vectors come in, and an unused parameter has no gradient
        self.max_positions = settings.max_positions

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        _check_length(values.shape[1], self.max_positions, "a clip has {} visual tokens")
        output: Tensor = self.blocks(inputs_embeds=values, attention_mask=mask).last_hidden_state
        return output


class TextEncoder(nn.Module):
    """Token ids [B, L] and mask [B, L] -> [B, L, D]: own embedding, mBART encoder blocks.

    InputError if an mBART that it is to start from cannot be had or has other token ids.
    """

    def __init__(self, settings: TransformerSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        if isinstance(settings, TextEncoderSettings) and settings.pretrained is not None:
            mbart = _load_mbart(settings.pretrained, vocabulary, dropout=settings.dropout, attention_dropout=0.0)
            self.blocks = mbart.get_encoder()
        else:
            self.blocks = MBartEncoder(_blocks_config(settings, vocabulary))
        checkpoint_blocks(self.blocks.layers, settings)
        self.max_positions: int = self.blocks.config.max_position_embeddings
        self.width: int = self.blocks.config.d_model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        _check_length(ids.shape[1], self.max_positions, "a sentence has {} tokens")
        output: Tensor = self.blocks(input_ids=ids, attention_mask=mask).last_hidden_state
        return output


class TextDecoder(nn.Module):
    """Token ids [B, L], memory [B, T, D] and its mask -> logits [B, L, V]: own embedding, causal mBART decoder blocks
    with cross-attention, an output layer of its own (not tied, no bias)."""

    def __init__(self, settings: TransformerSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.blocks = MBartDecoder(_blocks_config(settings, vocabulary))
        checkpoint_blocks(self.blocks.layers, settings)
        self.lm_head = nn.Linear(settings.width, vocabulary.size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self.max_positions = settings.max_positions

    def forward(self, ids: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        _check_length(ids.shape[1], self.max_positions, "a sentence has {} tokens")
        # Sentences are padded on the right, so the causal mask alone keeps padding out of every valid position.
        hidden = self.blocks(
            input_ids=ids, encoder_hidden_states=memory, encoder_attention_mask=memory_mask, use_cache=False
        ).last_hidden_state
        logits: Tensor = self.lm_head(hidden)
        return logits


def build_language_model(settings: LanguageModelSettings, vocabulary: Vocabulary) -> MBartForConditionalGeneration:
    """An mBART-architecture encoder-decoder: random weights of the settings' sizes, or ``settings.pretrained`` (sizes
    from there, dropout from the settings).

    InputError if the weights cannot be had, or if their vocabulary is not the tokenizer's.
    """
    if settings.pretrained is None:
        _check_heads(settings.width, settings.heads)
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
        model = _load_mbart(
            settings.pretrained, vocabulary, dropout=settings.dropout, attention_dropout=settings.attention_dropout
        )
    checkpoint_blocks([*model.get_encoder().layers, *model.get_decoder().layers], settings)
    return _decoding_by_the_recipe(model, vocabulary)


def build_encoder_decoder(
    encoder: TransformerSettings, decoder: TextDecoderSettings, vocabulary: Vocabulary
) -> MBartForConditionalGeneration:
    """Encoder of vectors and text decoder of one width, each of its own size (GFSLT-VLP). One token embedding, which
    only the decoder reads; the output layer is another matrix, freshly drawn, unless ``decoder.tied``.

    InputError if the widths differ, or an mBART that the decoder is to start from cannot be had or has other token ids.
    """
    mbart = None if decoder.pretrained is None else _load_mbart(decoder.pretrained, vocabulary, dropout=decoder.dropout)
    if mbart is not None and decoder.start == "decoder":
        model = mbart
    else:
        config = _blocks_config(decoder, vocabulary)
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
    return _decoding_by_the_recipe(model, vocabulary)


def load_decoder_start(settings: TextDecoderSettings, decoder: TextDecoder, vocabulary: Vocabulary) -> None:
    """Token embedding, positions and output layer of ``decoder`` from the mBART that ``settings`` names, if any."""
    if settings.pretrained is not None:
        mbart = _load_mbart(settings.pretrained, vocabulary)
        start_embeddings(decoder.blocks, mbart, settings.pretrained)
        with torch.no_grad():
            decoder.lm_head.weight.copy_(mbart.lm_head.weight)


def start_embeddings(decoder: MBartDecoder, mbart: MBartForConditionalGeneration, name: str | None) -> None:
    """Token embedding and positions of ``mbart`` (called ``name``) into ``decoder``; InputError if sizes differ."""
    source = mbart.get_decoder()
    for part in ("embed_tokens", "embed_positions"):
        own, given = getattr(decoder, part).weight, getattr(source, part).weight
        if own.shape != given.shape:
            raise InputError(
                f"method.text_decoder: {part} of {name!r} is {tuple(given.shape)}, wanted is {tuple(own.shape)}; set "
                f"width and max_positions to the model's"
            )
        with torch.no_grad():
            own.copy_(given)


def _load_mbart(name: str, vocabulary: Vocabulary, **options: float) -> MBartForConditionalGeneration:
    model = load_pretrained(MBartForConditionalGeneration, name, attn_implementation="sdpa", **options)
    found = model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id
    if found != (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id):
        raise InputError(
            f"language model {name!r} has {found[0]} token ids, padding {found[1]} and end {found[2]}; the tokenizer "
            f"has {vocabulary.size}, {vocabulary.pad_id} and {vocabulary.eos_id}: "
            f"set text.tokenizer to the tokenizer that belongs to the model"
        )
    return model


def _decoding_by_the_recipe(
    model: MBartForConditionalGeneration, vocabulary: Vocabulary
) -> MBartForConditionalGeneration:
    """Never by what a checkpoint's generation_config.json happens to say."""
    model.generation_config = GenerationConfig(pad_token_id=vocabulary.pad_id, eos_token_id=vocabulary.eos_id)
    return model


def beam_search(
    model: MBartForConditionalGeneration,
    inputs: Tensor,
    mask: Tensor,
    language_ids: Tensor,
    *,
    beams: int,
    length_penalty: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """The best sentence for each row of input vectors [B, T, D] with mask [B, T], by transformers' beam search.

    The decoder starts from the row's language id (``language_ids`` [B]). Returns token ids without language code, </s>
    and padding; at most ``max_new_tokens``.
    """
    options = {"num_beams": beams, "length_penalty": length_penalty, "max_new_tokens": max_new_tokens}
    return [ids for (ids,) in _search(model, inputs, mask, language_ids, **options)[0]]


@dataclass(frozen=True)
class Hypothesis:
    """Token ids without special ones; the sum of their log probabilities, </s> among them, divided by their number to
    the power of the length penalty."""

    ids: list[int]
    score: float


def n_best(
    model: MBartForConditionalGeneration,
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
    options = {"num_beams": beams, "length_penalty": length_penalty, "max_new_tokens": max_new_tokens}
    found, generated = _search(model, inputs, mask, language_ids, num_return_sequences=n, output_scores=True, **options)
    if beams > 1:
        scores = generated.sequences_scores.view(-1, n).tolist()
    else:
        steps = model.compute_transition_scores(generated.sequences, generated.scores, normalize_logits=True)
        lengths = [min(len(ids) + 1, steps.shape[1]) for (ids,) in found]
        scores = [[float(row[:k].sum()) / k**length_penalty] for row, k in zip(steps, lengths, strict=True)]
    return [[Hypothesis(*pair) for pair in zip(*row, strict=True)] for row in zip(found, scores, strict=True)]


@torch.no_grad()
def _search(
    model: MBartForConditionalGeneration, inputs: Tensor, mask: Tensor, language_ids: Tensor, **options: Any
) -> tuple[list[list[list[int]]], Any]:
    """(ids of the sentences of each row, best first; what transformers' generate returned)."""
    if options["max_new_tokens"] >= model.config.max_position_embeddings:
        raise InputError(
            f"evaluation.max_new_tokens {options['max_new_tokens']} does not fit the decoder's "
            f"{model.config.max_position_embeddings} positions"
        )
    hidden = model.get_encoder()(inputs_embeds=inputs, attention_mask=mask).last_hidden_state
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    generated = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        attention_mask=mask.long(),
        generation_config=GenerationConfig(
            do_sample=False,
            decoder_start_token_id=language_ids.tolist(),
            eos_token_id=eos,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **options,
        ),
    )
    found = [_until(row[1:], eos, pad) for row in generated.sequences.tolist()]
    n = len(found) // len(inputs)
    return [found[row : row + n] for row in range(0, len(found), n)], generated


def _until(ids: list[int], *ends: int) -> list[int]:
    stop = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _blocks_config(settings: TransformerSettings, vocabulary: Vocabulary) -> MBartConfig:
    """Token embeddings are scaled by sqrt(D) as in mBART, so that they are not drowned by nothing but positions."""
    _check_heads(settings.width, settings.heads)
    return MBartConfig(
        vocab_size=vocabulary.size,
        pad_token_id=vocabulary.pad_id,
        eos_token_id=vocabulary.eos_id,
        d_model=settings.width,
        encoder_layers=settings.layers,
        decoder_layers=settings.layers,
        encoder_attention_heads=settings.heads,
        decoder_attention_heads=settings.heads,
        encoder_ffn_dim=settings.feed_forward,
        decoder_ffn_dim=settings.feed_forward,
        dropout=settings.dropout,
        attention_dropout=0.0,
        activation_function=settings.activation,
        max_position_embeddings=settings.max_positions,
        scale_embedding=True,
        forced_eos_token_id=None,
        attn_implementation="sdpa",
    )


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise InputError(f"transformer width {width} is not a multiple of its {heads} heads")


def _check_length(length: int, positions: int, found: str) -> None:
    if length > positions:
        raise InputError(f"{found.format(length)}, the transformer has {positions} positions; raise max_positions")
