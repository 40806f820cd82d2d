"""Transformers over tokens: mBART-style encoder and decoder stacks, from nothing or from a published mBART.

Letters: B sequences, T longest, L text tokens, D width, V vocabulary. Masks are true (1) at valid steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import MBartConfig, MBartForConditionalGeneration
from transformers.models.mbart.modeling_mbart import MBartDecoder, MBartEncoder

from sltscale.config import SentenceEncoderSettings, TextDecoderSettings, TransformerSettings
from sltscale.errors import InputError
from sltscale.models.memory import checkpoint_blocks
from sltscale.models.pretrained import load_pretrained


@dataclass(frozen=True)
class Vocabulary:
    """What a model has to know of the tokenizer: number of ids, and the ids of padding and end of sentence.

    pseudo_glosses: how many there are to learn, where the method learns them. prompts: where the language is told by
    a prompt, the token ids of that for the language with the id size + i, for every i. start: what a decoder-only
    model is used to find in front of everything.
    """

    size: int
    pad_id: int
    eos_id: int
    pseudo_glosses: int = field(default=0, compare=False)
    prompts: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    start: tuple[int, ...] = field(default=(), compare=False)


class TransformerEncoder(nn.Module):
    """Vectors [B, T, D] and mask [B, T] -> [B, T, D]: mBART encoder blocks (learned positions, pre-norm, layer norm
    after the embedding and at the end), without a token embedding."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        self.blocks = MBartEncoder(blocks_config(settings, Vocabulary(size=2, pad_id=1, eos_id=0)))
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
        if isinstance(settings, SentenceEncoderSettings) and settings.pretrained is not None:
            mbart = load_mbart(settings.pretrained, vocabulary, dropout=settings.dropout, attention_dropout=0.0)
            self.blocks = mbart.get_encoder()
        else:
            self.blocks = MBartEncoder(blocks_config(settings, vocabulary))
        checkpoint_blocks(self.blocks.layers, settings)
        self.max_positions: int = self.blocks.config.max_position_embeddings
        self.width: int = self.blocks.config.d_model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        _check_length(ids.shape[1], self.max_positions, "a sentence has {} tokens")
        output: Tensor = self.blocks(input_ids=ids, attention_mask=mask).last_hidden_state
        return output


class TextDecoder(nn.Module):
    """Token ids [B, L], memory [B, T, D] and its mask -> logits [B, L, V]: own embedding, causal mBART decoder blocks
    with cross-attention, an output layer of its own without bias; a method may tie or share them."""

    def __init__(self, settings: TransformerSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.blocks = MBartDecoder(blocks_config(settings, vocabulary))
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


def load_decoder_start(settings: TextDecoderSettings, decoder: TextDecoder, vocabulary: Vocabulary) -> None:
    """Token embedding, positions and output layer of ``decoder`` from the mBART that ``settings`` names, if any."""
    if settings.pretrained is not None:
        mbart = load_mbart(settings.pretrained, vocabulary)
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


def load_mbart(name: str, vocabulary: Vocabulary, **options: float) -> MBartForConditionalGeneration:
    model = load_pretrained(MBartForConditionalGeneration, name, attn_implementation="sdpa", **options)
    found = model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id
    if found != (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id):
        raise InputError(
            f"language model {name!r} has {found[0]} token ids, padding {found[1]} and end {found[2]}; the tokenizer "
            f"has {vocabulary.size}, {vocabulary.pad_id} and {vocabulary.eos_id}: "
            f"set text.tokenizer to the tokenizer that belongs to the model"
        )
    return model


def blocks_config(settings: TransformerSettings, vocabulary: Vocabulary) -> MBartConfig:
    """Token embeddings are scaled by sqrt(D) as in mBART, so that they are not drowned by nothing but positions."""
    check_heads(settings.width, settings.heads)
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


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise InputError(f"transformer width {width} is not a multiple of its {heads} heads")


def _check_length(length: int, positions: int, found: str) -> None:
    if length > positions:
        raise InputError(f"{found.format(length)}, the transformer has {positions} positions; raise max_positions")
