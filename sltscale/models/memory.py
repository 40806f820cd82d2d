"""Less memory for activations: blocks that keep only what goes into them, and compute the rest again in the backward.

What is frozen and gets nothing trained as input keeps nothing anyway: autograd records only what leads to a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sltscale.config import ActivationSettings
from sltscale.models.layers import uncounted


def checkpoint_blocks(blocks: Iterable[nn.Module], settings: ActivationSettings) -> None:
    """Make each of ``blocks`` save memory as its tower's settings want it. Names, outputs and gradients stay.

    A block must not hold parameters itself, only in modules inside it: ZeRO-3 gathers them when those are called, also
    the second time. Random numbers are drawn again as the first time; batch norms count what they see once.
    """
    if settings.checkpoint_activations:
        for block in blocks:
            if list(block.parameters(recurse=False)):
                raise ValueError(f"{type(block).__name__} holds parameters itself; checkpoint what is around it")
            block.forward = partial(_checkpointed, block, block.forward, settings.offload_activations)


def _checkpointed(block: nn.Module, forward: Any, offload: bool, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    # The hooks that checkpoint sets for what is inside the block hide this one, so it gets the block's inputs.
    with saved_tensors_hooks(_to_cpu, _back) if offload else nullcontext():
        return checkpoint(
            forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), uncounted(block)), **options
        )


def _to_cpu(tensor: Tensor) -> tuple[torch.device, Tensor]:
    # Not torch's save_on_cpu: it forgets channels_last, and with it the fast convolutions.
    held = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
    return tensor.device, held.copy_(tensor)


def _back(held: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = held
    return tensor.to(device, non_blocking=True)
