"""Attention within each of many packed sequences, by whichever kernel is at hand.

Letters: N packed steps (sum of lengths), B sequences, H heads, D head width. ``reach`` is how many steps a query sees
to its left and right, -1 for all of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sltscale.errors import InputError

HALVES = (torch.float16, torch.bfloat16)
ALL_STEPS = -1


@dataclass(frozen=True)
class _Call:
    """What every backend is handed beside query, key and value."""

    cu_seqlens: Tensor
    max_seqlen: int
    reach: tuple[int, int]
    dropout: float


@dataclass(frozen=True)
class Backend:
    """run: (query, key, value [N, H, D], call) -> [N, H, D]. kernel: module and function of the CUDA kernel it calls,
    None if it runs anywhere. dtypes: those that the kernel takes. has_dropout: of the attention weights."""

    run: Callable[[Tensor, Tensor, Tensor, _Call], Tensor]
    kernel: tuple[str, str] | None = None
    dtypes: tuple[torch.dtype, ...] = HALVES
    has_dropout: bool = True


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(query key^T / sqrt(D)) value within each packed sequence: [N, H, D] each -> [N, H, D].

    cu_seqlens int32 [B+1] and max_seqlen as in ``Ragged``; sequences may be empty. causal: no step sees a later one.
    window: odd; a step sees (window - 1) / 2 steps to either side and itself, so 7 is 3 left and 3 right; with causal
    the left ones only. dropout: of the attention weights, the caller passes 0 outside training. backend: a name of
    ``BACKENDS``, None for the first that can do it (``choose_backend``).

    No backend ever holds a mask over the whole pack. InputError if the backend cannot be had; ValueError for an even
    window.
    """
    call = _Call(cu_seqlens, max_seqlen, _reach(causal, window, max_seqlen), dropout)
    if query.shape[0] == 0:
        return query + key + value  # nothing, but with a gradient for each
    name = _choose(query.device, query.dtype, query.shape[-1], dropout > 0, _two_sided(causal, window), backend)
    return BACKENDS[name].run(query, key, value, call)


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> str:
    """The name in ``BACKENDS`` that ``packed_attention`` takes for these: ``backend`` itself if it can do it, else the
    first that can. InputError, in one line, if ``backend`` is unknown, not installed or cannot do it."""
    return _choose(device, dtype, head_dim, dropout > 0, _two_sided(causal, window), backend)


@functools.cache
def _choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool, two_sided: bool, wanted: str | None
) -> str:
    able = (name for name in BACKENDS if _refusal(name, device, dtype, head_dim, dropout, two_sided) is None)
    if wanted is None:
        return next(able)
    if wanted not in BACKENDS:
        raise InputError(f"attention backend {wanted!r} is unknown; expected one of {', '.join(BACKENDS)}")
    refusal = _refusal(wanted, device, dtype, head_dim, dropout, two_sided)
    if refusal is not None:
        raise InputError(f"attention backend {wanted} {refusal}, or take one of {', '.join(able)}")
    return wanted


def _refusal(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool, two_sided: bool
) -> str | None:
    """Why this backend cannot do it, ready to follow its name; None if it can."""
    backend = BACKENDS[name]
    if backend.kernel is None:
        return None
    # xformers' two-sided window is flash attention, whatever its other masks can do
    dtypes = HALVES if two_sided else backend.dtypes
    if importlib.util.find_spec(backend.kernel[0].split(".")[0]) is None:
        return "is not installed: pip install 'sltscale[cuda]'"
    if device.type != "cuda":
        return f"needs a CUDA device, found {device.type}: run on one"
    if not _importable(*backend.kernel):
        return f"is installed, but not for torch {torch.__version__}: install 'sltscale[cuda]' again"
    if dtype not in dtypes:
        expected = " or ".join(str(one).removeprefix("torch.") for one in dtypes)
        return f"needs {expected}, found {str(dtype).removeprefix('torch.')}: train in bfloat16"
    if head_dim % 8 or head_dim > 256:
        return f"needs heads of a width that is a multiple of 8, at most 256, found {head_dim}: change width or heads"
    if dtypes == HALVES and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer: run on one"
    if dropout and not backend.has_dropout:
        return "has no dropout of attention weights: set it to 0"
    return None


@functools.cache
def _importable(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except (ImportError, OSError):
        return False


def _two_sided(causal: bool, window: int | None) -> bool:
    return window is not None and not causal


def _reach(causal: bool, window: int | None, max_seqlen: int) -> tuple[int, int]:
    if window is not None and (window < 1 or window % 2 == 0):
        raise ValueError(f"an attention window is odd and at least 1, found {window}")
    side = ALL_STEPS if window is None or window // 2 >= max_seqlen - 1 else window // 2
    return side, 0 if causal else side


def _reference(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """One sequence after the other, in the open."""
    left, right = (math.inf if side == ALL_STEPS else side for side in call.reach)
    outputs = []
    lengths = call.cu_seqlens.diff().tolist()
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        steps = torch.arange(len(q), device=q.device)
        ahead = steps[None, :] - steps[:, None]
        hidden = (ahead < -left) | (ahead > right)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", F.dropout(weights, call.dropout), v))
    return torch.cat(outputs)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    left, right = call.reach
    if left != ALL_STEPS:
        return _sdpa_blocks(query, key, value, call)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=call.dropout, is_causal=right == 0).transpose(1, 2)

    return _by_length(query, key, value, call.cu_seqlens, attend)


def _sdpa_blocks(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    """A window over the pack as it lies: cut into blocks of queries, each with the keys that it can reach. Work and
    mask are linear in N; the device is not asked for the lengths."""
    left, right = call.reach
    steps, heads, width = query.shape
    block = max(32, left + right)
    blocks = -(-steps // block)
    starts = torch.arange(0, blocks * block, block, device=query.device)[:, None]
    query_places = starts + torch.arange(block, device=query.device)
    key_places = starts + torch.arange(-left, block + right, device=query.device)
    # The sequence of a place; those before and after the pack are of one each, so that no row is without a key.
    of_query, of_key = (torch.bucketize(place, call.cu_seqlens, right=True) for place in (query_places, key_places))
    ahead = key_places[:, None, :] - query_places[:, :, None]
    seen = (of_query[:, :, None] == of_key[:, None, :]) & (ahead >= -left) & (ahead <= right)

    queries = F.pad(query, (0, 0, 0, 0, 0, blocks * block - steps)).view(blocks, block, heads, width).transpose(1, 2)
    reached = key_places.clamp(0, steps - 1).flatten()
    keys, values = (x.index_select(0, reached).view(blocks, -1, heads, width).transpose(1, 2) for x in (key, value))
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None], dropout_p=call.dropout)
    return attended.transpose(1, 2).reshape(blocks * block, heads, width)[:steps]


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """``attend`` ([G, T, H, D] each -> [G, T, H, D]) once for each distinct length T, on the G sequences that have it:
    exact, without padding or masks. The lengths are asked of the device."""
    lengths = cu_seqlens.diff().tolist()
    pieces = [x.split(lengths) for x in (query, key, value)]
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault(length, []).append(index)
    attended = list(pieces[2])  # where empty sequences stay as they are
    for length, indices in members.items():
        if length:
            group = attend(*(torch.stack([piece[index] for index in indices]) for piece in pieces))
            for index, output in zip(indices, group.unbind(), strict=True):
                attended[index] = output
    return torch.cat(attended)


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    flash_attn: Any = importlib.import_module("flash_attn")
    output: Tensor = flash_attn.flash_attn_varlen_func(
        query,
        key,
        value,
        call.cu_seqlens,
        call.cu_seqlens,
        call.max_seqlen,
        call.max_seqlen,
        dropout_p=call.dropout,
        causal=call.reach == (ALL_STEPS, 0),
        window_size=call.reach,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    ends, longest = call.cu_seqlens, call.max_seqlen
    output: Tensor = varlen.varlen_attn(query, key, value, ends, ends, longest, longest, window_size=call.reach)
    return output


def _xformers(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> Tensor:
    fmha: Any = importlib.import_module("xformers.ops.fmha")
    left, right = call.reach
    if right > 0:  # no two-sided window over packed sequences there has a backward

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            band = fmha.attn_bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
            output: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=band, p=call.dropout)
            return output

        return _by_length(query, key, value, call.cu_seqlens, attend)
    lengths = [length for length in call.cu_seqlens.diff().tolist() if length]
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=query.device)
    if right == 0:
        mask = mask.make_causal() if left == ALL_STEPS else mask.make_local_attention(left + 1)
    output: Tensor = fmha.memory_efficient_attention(
        query[None], key[None], value[None], attn_bias=mask, p=call.dropout
    )
    return output[0]


# In the order in which they are tried; reference is there to be compared with.
BACKENDS: dict[str, Backend] = {
    "flash_attn": Backend(_flash_attn, ("flash_attn", "flash_attn_varlen_func")),
    "torch_varlen": Backend(_torch_varlen, ("torch.nn.attention.varlen", "varlen_attn"), has_dropout=False),
    "xformers": Backend(
        _xformers, ("xformers.ops.fmha", "memory_efficient_attention"), dtypes=(*HALVES, torch.float32)
    ),
    "sdpa": Backend(_sdpa),
    "reference": Backend(_reference),
}
