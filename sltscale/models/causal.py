"""Decoder-only language models (whatever ``AutoModelForCausalLM`` loads), and how they read visual tokens and write.

One sequence: what the tokenizer begins every text with, visual tokens, the prompt for the sentence's language, the
sentence. Letters: B sentences, T visual tokens, P of the longest prompt, S of all three together, L text tokens, D
width, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sltscale.config import CausalSettings
from sltscale.errors import InputError
from sltscale.models.decoding import Coupling, decoding_by_the_recipe, positions_of
from sltscale.models.language import Vocabulary, check_heads
from sltscale.models.memory import checkpoint_blocks
from sltscale.models.pretrained import load_pretrained
from sltscale.structures import TextBatch


class PrefixCoupling(Coupling):
    """What is read stands before what is written, padded on the left, so that writing begins at the same place in every
    row; positions count valid steps. Only the sentence and its end are learnt."""

    def logits(self, model: Any, values: Tensor, mask: Tensor, text: TextBatch) -> Tensor:
        ids, valid = text.without_language(self.vocabulary.pad_id)
        prefix, prefix_mask = self.prefix(model, values, mask, text.language_ids())
        # Each step says the next token, the last step of the prefix the first.
        written = model.get_input_embeddings()(ids[:, :-1]).to(prefix.dtype)
        whole = torch.cat([prefix_mask, valid[:, :-1].to(prefix_mask.dtype)], 1)
        self._check_length(model, whole.shape[1])
        options: dict[str, Any] = {}
        if "position_ids" in inspect.signature(model.forward).parameters:  # not where positions come from the mask
            options["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
        logits: Tensor = model(
            inputs_embeds=torch.cat([prefix, written], 1),
            attention_mask=whole,
            use_cache=False,
            logits_to_keep=ids.shape[1],
            **options,
        ).logits
        return logits

    def started(self, model: Any, values: Tensor, mask: Tensor, language_ids: Tensor) -> dict[str, Any]:
        prefix, prefix_mask = self.prefix(model, values, mask, language_ids)
        return {"inputs_embeds": prefix, "attention_mask": prefix_mask}

    def prefix(self, model: Any, values: Tensor, mask: Tensor, language_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors [B, S, D], mask int64 [B, S]) of start, visual tokens and prompt, padding on the left."""
        mask = mask.long()
        if self.vocabulary.start:
            start = torch.tensor([self.vocabulary.start] * len(mask), device=mask.device)
            embedded = model.get_input_embeddings()(start).to(values.dtype)
            values, mask = torch.cat([embedded, values], 1), torch.cat([torch.ones_like(start), mask], 1)
        longest = max(map(len, self.vocabulary.prompts), default=0)
        if longest:
            rows = [[*prompt, *[self.vocabulary.pad_id] * longest][:longest] for prompt in self.vocabulary.prompts]
            lengths = torch.tensor([len(prompt) for prompt in self.vocabulary.prompts], device=mask.device)
            language = language_ids - self.vocabulary.size
            prompts = torch.tensor(rows, device=mask.device)[language]
            prompt_mask = torch.arange(longest, device=mask.device)[None] < lengths[language][:, None]
            embedded = model.get_input_embeddings()(prompts).to(values.dtype)
            values, mask = torch.cat([values, embedded], 1), torch.cat([mask, prompt_mask.long()], 1)
        order = mask.argsort(dim=1, stable=True)  # padding first, the rest in its order
        return values.gather(1, order[..., None].expand_as(values)), mask.gather(1, order)

    def _check_length(self, model: Any, length: int) -> None:
        positions = positions_of(model)
        if positions is not None and length > positions:
            raise InputError(
                f"start, visual tokens, prompt and sentence are {length} steps, the language model has {positions} "
                f"positions; lower data.max_frames or text.max_tokens, or take another language model"
            )


def build_causal(settings: CausalSettings, vocabulary: Vocabulary) -> Any:
    """A Llama with random weights of the settings' sizes, or what ``settings.pretrained`` holds, sizes and all.

    InputError if the weights cannot be had, or if the tokenizer has ids that they do not have or another end.
    """
    if settings.pretrained is None:
        check_heads(settings.width, 2 * settings.heads)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary.size,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=vocabulary.eos_id,
                hidden_size=settings.width,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                intermediate_size=settings.feed_forward,
                attention_dropout=settings.attention_dropout,
                max_position_embeddings=settings.max_positions,
                initializer_range=settings.init_std,
                attn_implementation="sdpa",
            )
        )
    else:
        model = load_pretrained(AutoModelForCausalLM, settings.pretrained, trust_remote_code=False)
        config = model.config.get_text_config()
        size, ends = config.vocab_size, config.eos_token_id
        known = ends if isinstance(ends, list) else [ends]
        if vocabulary.size > size or (ends is not None and vocabulary.eos_id not in known):
            raise InputError(
                f"language model {settings.pretrained!r} has {size} token ids and end {ends}; the tokenizer has "
                f"{vocabulary.size} and {vocabulary.eos_id}: "
                f"set text.tokenizer to the tokenizer that belongs to the model"
            )
    checkpoint_blocks(_blocks(model), settings)
    return decoding_by_the_recipe(model, vocabulary)


def _blocks(model: Any) -> nn.ModuleList:
    """The list of its layers, whatever the architecture calls it."""
    number = model.config.get_text_config().num_hidden_layers
    return next(found for found in model.modules() if isinstance(found, nn.ModuleList) and len(found) == number)
