"""Gathers of the field whose gradients depend on the number of ranks, for the test of updates to catch.

Each takes the place of ``parallel.gather``. With every anchor as a rank's own the loss is the global one on every rank;
else it is that of a rank's own rows, and the ranks' losses are summed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sltscale import parallel

exact = parallel.gather


def exact_with_global_loss(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, slice]:
    """No flaw: what is exact for a rank's own rows is so for all of them."""
    every, every_mask, _ = exact(tensor, mask)
    return every, every_mask, slice(None)


def own_slot_with_own_rows(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, slice]:
    """A plain all-gather, which has no gradient, and this rank's own rows put back into it."""
    every, every_mask, own = exact(tensor.detach(), mask)
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, every.shape[1] - tensor.shape[1]))
    return torch.cat([every[: own.start], padded, every[own.stop :]]), every_mask, own


def own_slot_with_global_loss(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, slice]:
    """The same before the global loss: open_clip's default (gather_with_grad off, local_loss off)."""
    every, every_mask, _ = own_slot_with_own_rows(tensor, mask)
    return every, every_mask, slice(None)


class _MeanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / dist.get_world_size()


def averaging_with_own_rows(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, slice]:
    """Averages over the ranks in its backward where it should sum (DisCo-CLIP)."""
    return exact(_MeanBackward.apply(tensor), mask)


GATHERS = {
    gather.__name__: gather
    for gather in (
        exact_with_global_loss,
        own_slot_with_own_rows,
        own_slot_with_global_loss,
        averaging_with_own_rows,
    )
}
