"""The transformers of transformers on the backends of ``models/attention.py``, through transformers' own attention
interface: self-attention without padding, and without a dense mask.

Letters: B rows, L longest, H heads, D head width. Masks are true (1) at valid steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from sltscale.models.attention import BACKENDS, HALVES, choose_backend, packed_attention

PACKED = "packed"  # what transformers calls it; not after a backend: it takes names with "flash" in them for its own
OWN = "transformers' own"


@dataclass(frozen=True)
class _Packing:
    """places: int64 [N], where in [B * L] the valid steps are, None if all are. cu_seqlens: int32 [B+1]."""

    places: Tensor | None
    cu_seqlens: Tensor

    def packed(self, padded: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]."""
        steps = padded.flatten(0, 1)
        return steps if self.places is None else steps.index_select(0, self.places)

    def padded(self, packed: Tensor, rows: int, longest: int) -> Tensor:
        """[N, ...] -> [B, L, ...] with zeros between."""
        if self.places is not None:
            everywhere = packed.new_zeros(rows * longest, *packed.shape[1:])
            packed = everywhere.index_copy(0, self.places, packed)
        return packed.unflatten(0, (rows, longest))


# By mask, so that the layers that are handed the same one ask the device for its valid steps once.
_packings = WeakTensorKeyDictionary()


def check_packed(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """InputError, in one line, if there is no such backend for this device and number type: what can be said before
    there is a model. ``attend_packed`` then looks at head widths and dropout."""
    choose_backend(device, dtype, 64, backend=backend)


def attend_packed(
    module: nn.Module, device: torch.device, dtype: torch.dtype, backend: str | None = None
) -> dict[str, list[str]]:
    """Let every transformer of transformers inside ``module`` attend by ``backend``; returns who attends by what.

    backend: a name of ``BACKENDS``; None takes the first CUDA kernel that can do it, in half precision on a GPU, and
    else leaves all to transformers' sdpa on padded rows. device and dtype: where and in what ``module`` will train. The
    result lists the transformers' names in ``module`` by backend, ``OWN`` for those that are left as they are.

    Packed is self-attention over whole rows, full or causal, with or without padding: mBART's encoder, its decoder
    under teacher forcing, causal language models with padding on either side (also the first step of their decoding,
    which reads what is to be gone on from), DINOv2's blocks. Rows come back with zeros at padding, where transformers'
    sdpa leaves what nobody reads. To transformers' sdpa, under the mask that it has always had, go: cross-attention,
    decoding from a cache, sliding windows, and masks that somebody has made by hand. Left as they are: models with
    relative positions (mT5), and whatever transformers itself does not let attend without a dense mask or does not run
    on sdpa (Bloom, XGLM, Gemma 2).

    InputError, in one line, if the backend that was asked for cannot be had for one of them.
    """
    found: dict[str, list[str]] = {}
    for name, model in _outermost(module):
        attentions = [layer for layer in model.modules() if "Attention" in type(layer).__name__]
        if not attentions:
            continue
        layers = [layer for layer in attentions if hasattr(layer, "is_causal") and hasattr(layer, "head_dim")]
        chosen = _choose(model, layers, device, dtype, backend)
        found.setdefault(chosen or OWN, []).append(name)
        if chosen is not None:
            model.set_attn_implementation(PACKED)
            for layer in layers:
                layer.packed_backend = chosen
    return found


def _outermost(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(module, PreTrainedModel):
        yield name, module
    else:
        for own, child in module.named_children():
            yield from _outermost(child, f"{name}.{own}".removeprefix("."))


def _choose(model: Any, layers: list[Any], device: torch.device, dtype: torch.dtype, backend: str | None) -> str | None:
    if not layers or model.config._attn_implementation != "sdpa" or not model._supports_flash_attn:
        return None
    if backend is None and (device.type != "cuda" or dtype not in HALVES):
        return None
    dropout = max(map(_dropout, layers))
    widths = sorted({layer.head_dim for layer in layers})
    names = [choose_backend(device, dtype, width, dropout=dropout, backend=backend) for width in widths]
    if backend is None and any(BACKENDS[name].kernel is None for name in names):
        return None
    return names[0]


def _dropout(layer: nn.Module) -> float:
    """Of its attention weights, whatever the architecture calls it."""
    names = ("attention_dropout", "attn_dropout", "dropout")
    found: Any = next((getattr(layer, name) for name in names if hasattr(layer, name)), 0.0)
    return float(found.p if isinstance(found, nn.Dropout) else found)


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """What transformers asks for in place of a mask [B, 1, L, L], once in a pass through a stack: the padding mask
    [B, L] itself (None without one) where ``_attend`` can pack by it, else transformers' own for sdpa."""
    plain = (mask_function is causal_mask_function and allow_is_causal_skip) or (
        mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    )
    rows = (batch_size, q_length)
    whole = q_length > 1 and kv_length == q_length and kv_offset == 0 and bool(q_offset == 0)
    if plain and whole and (attention_mask is None or tuple(attention_mask.shape) == rows):
        return attention_mask
    mask: Tensor | None = AttentionMaskInterface()["sdpa"](
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **options,
    )
    return mask


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, L, D], key and value [B, H or fewer, L, D], mask as ``_padding_mask`` has it -> [B, L, H, D].

    Whether it is causal is what the layer says, as transformers' flash attention takes it.
    """
    causal = bool(module.is_causal if is_causal is None else is_causal)
    whole = query.shape[2] == key.shape[2] > 1 and (attention_mask is None or attention_mask.dim() == 2)
    across = getattr(module, "is_decoder", False) and not causal
    if not whole or across or options.get("softcap") is not None:  # which sdpa refuses
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :]
        output, _ = AttentionInterface()["sdpa"](
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
        return output, None

    rows, heads, longest, width = query.shape
    if scaling is not None and scaling != width**-0.5:
        query = query * (scaling * width**0.5)
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    packing = _packing(attention_mask, rows, longest, query.device)
    query, key, value = (packing.packed(x.transpose(1, 2)) for x in (query, key, value))
    attended = packed_attention(
        query,
        key,
        value,
        packing.cu_seqlens,
        longest,
        causal=causal,
        dropout=dropout,
        backend=getattr(module, "packed_backend", None),
    )
    return packing.padded(attended, rows, longest), None


def _packing(mask: Tensor | None, rows: int, longest: int, device: torch.device) -> _Packing:
    if mask is None:
        return _Packing(None, torch.arange(rows + 1, dtype=torch.int32, device=device) * longest)
    known: _Packing | None = _packings.get(mask)
    if known is None:
        places = mask.flatten().nonzero()[:, 0]
        starts = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        known = _Packing(None if len(places) == rows * longest else places, starts)
        _packings[mask] = known
    return known


AttentionInterface.register(PACKED, _attend)
AttentionMaskInterface.register(PACKED, _padding_mask)
