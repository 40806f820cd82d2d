"""Ranks and what travels between them: world size, exact differentiable sums and gathers, balanced shares.

Gradient convention: every collective with a gradient here sums its backward over the ranks, and the engine averages
parameter gradients over the W ranks. Together a loss that each rank computes over the whole global batch (or over
its own rows, as sum and count) yields the gradient of a single process that holds the full batch. Measured against
the gathers found in the field in docs/engine.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sltscale.errors import InputError

T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of a same-shaped tensor over the ranks; its gradient is summed over the ranks too."""
    return _SumOverRanks.apply(tensor) if is_distributed() else tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, slice]:
    """Every rank's sequences in rank order, differentiable; ranks may hold different numbers and lengths.

    tensor [B, T, D] and mask [B, T] (1 = valid) of this rank -> ([sum B, max T, D], the same with the mask's dtype,
    where this rank's own rows are among them); steps added to reach the longest T are zero and masked.
    """
    if not is_distributed():
        return tensor, mask, slice(0, len(tensor))
    shape = torch.tensor(tensor.shape[:2], device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(shapes, shape)
    counts = [int(s[0]) for s in shapes]
    rows, steps = max(counts), max(int(s[1]) for s in shapes)
    missing = (0, steps - tensor.shape[1], 0, rows - tensor.shape[0])
    every_tensor = _Gather.apply(torch.nn.functional.pad(tensor, (0, 0, *missing)))
    every_mask = _Gather.apply(torch.nn.functional.pad(mask, missing))
    before = sum(counts[: rank()])
    return (
        torch.cat([every_tensor[r, :count] for r, count in enumerate(counts)]),
        torch.cat([every_mask[r, :count] for r, count in enumerate(counts)]),
        slice(before, before + len(tensor)),
    )


def gather_objects(item: Any) -> list[Any]:
    """Small Python objects of every rank, in rank order, on every rank (only within the job's own group)."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 while the others wait; every rank gets its (small) result.

    An InputError there, or an OSError, which becomes one, is raised on every rank.
    """
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except InputError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = InputError(f"{error.filename or 'file system'}: {error.strerror or error}")
    if is_distributed():
        dist.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def barrier() -> None:
    if is_distributed():
        dist.barrier()
