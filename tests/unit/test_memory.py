"""Checkpointed towers: the same losses, gradients and statistics, with less kept for the backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sltscale.config import (
    ActivationSettings,
    LanguageModelSettings,
    ResNetSettings,
    TransformerSettings,
)
from sltscale.models.frames import FrameEncoder
from sltscale.models.language import TextDecoder, TextEncoder, TransformerEncoder, Vocabulary
from sltscale.models.mbart import build_mbart
from sltscale.models.memory import checkpoint_blocks
from sltscale.structures import Ragged

VOCABULARY = Vocabulary(40, 1, 2)
SIZES: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "feed_forward": 64, "dropout": 0.2, "max_positions": 32}
WITHOUT: dict[str, Any] = {}
WITH: dict[str, Any] = {"checkpoint_activations": True}
OFFLOADED = {**WITH, "offload_activations": True}


def frames(memory: dict[str, Any]) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    pixels = Ragged.from_list([torch.randint(0, 256, (3, 48, 32), dtype=torch.uint8) for _ in range(2)])
    tower = FrameEncoder(ResNetSettings(embedding_size=16, hidden_sizes=(16, 32), depths=(2, 1), **memory))
    return tower, lambda tower: tower(pixels).values


def transformer(memory: dict[str, Any]) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    values, mask = torch.randn(3, 9, 16), torch.arange(9)[None] < torch.tensor([[9], [4], [7]])
    return TransformerEncoder(TransformerSettings(**SIZES, **memory)), lambda tower: tower(values, mask)


def text_encoder(memory: dict[str, Any]) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    ids = torch.randint(3, 40, (3, 9))
    settings = TransformerSettings(**SIZES, **memory)
    return TextEncoder(settings, VOCABULARY), lambda tower: tower(ids, torch.ones_like(ids))


def text_decoder(memory: dict[str, Any]) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    ids, seen = torch.randint(3, 40, (3, 9)), torch.randn(3, 5, 16)
    settings = TransformerSettings(**SIZES, **memory)
    return TextDecoder(settings, VOCABULARY), lambda tower: tower(ids, seen, torch.ones(3, 5))


def language_model(memory: dict[str, Any]) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    values, ids = torch.randn(3, 9, 16), torch.randint(3, 40, (3, 7))
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "width": 16, "heads": 2, "feed_forward": 64, "max_positions": 32}
    tower = build_mbart(LanguageModelSettings(**sizes, **memory), VOCABULARY)
    return tower, lambda tower: tower(inputs_embeds=values, decoder_input_ids=ids, use_cache=False).logits


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What ``run`` returns, and the size of all that autograd keeps for its backward besides weights and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return output, sum(storages.values())


def step(build: Callable[..., Any], memory: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Output, gradients and buffers of a step in training mode, and what it kept."""
    torch.manual_seed(0)
    tower, run = build(memory)
    tower.train()
    output, kept = kept_bytes(tower, lambda: run(tower))
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}
    assert gradients
    return {"output": output, **gradients, **dict(tower.named_buffers())}, kept


@pytest.mark.parametrize("build", [frames, transformer, text_encoder, text_decoder, language_model])
def test_a_checkpointed_tower_is_the_same_and_keeps_less(build: Callable[..., Any]) -> None:
    expected, kept_before = step(build, WITHOUT)
    for memory in (WITH, OFFLOADED):
        found, kept = step(build, memory)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert kept < 0.55 * kept_before, f"{kept} of {kept_before} bytes"


def test_what_is_frozen_below_keeps_nothing() -> None:
    torch.manual_seed(0)
    tower, run = frames(WITHOUT)
    head = nn.Linear(32, 3)
    tower.requires_grad_(False)
    features, kept = kept_bytes(tower, lambda: run(tower))
    assert kept == 0 and not features.requires_grad
    output, kept = kept_bytes(head, lambda: head(run(tower)))
    assert kept == features.nbytes
    output.sum().backward()
    assert head.weight.grad is not None


def test_only_the_layers_above_the_lowest_trained_one_keep_anything() -> None:
    kept = []
    for frozen_layers in range(3):
        torch.manual_seed(0)
        tower, run = text_encoder(WITHOUT)
        blocks: Any = tower.get_submodule("blocks")
        for part in (blocks.embed_tokens, blocks.embed_positions, blocks.layernorm_embedding):
            part.requires_grad_(False)
        for layer in blocks.layers[:frozen_layers]:
            layer.requires_grad_(False)
        kept.append(kept_bytes(tower, lambda tower=tower, run=run: run(tower))[1])
    per_layer = kept[0] - kept[1]
    assert per_layer > 20_000 and kept[1] - kept[2] > 0.9 * per_layer and kept[2] < 0.2 * per_layer


def test_a_block_with_parameters_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear holds parameters itself"):
        checkpoint_blocks([nn.Linear(2, 2)], ActivationSettings(checkpoint_activations=True))


def test_offloading_needs_checkpointing() -> None:
    with pytest.raises(ValueError, match="offload_activations is set without checkpoint_activations"):
        ResNetSettings(offload_activations=True)
