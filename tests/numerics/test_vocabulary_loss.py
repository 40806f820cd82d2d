"""The vocabulary loss in chunks: the same loss and gradient as in one piece, without all logits in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sltscale.losses.seq2seq import label_smoothed_cross_entropy

CLASSES = 500


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 32, CLASSES, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (4, 32), generator=generator)
    labels[1, 20:] = labels[3, 1:] = -100
    return logits, labels


@pytest.mark.parametrize("chunk_elements", [1, 7 * CLASSES, 127 * CLASSES, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_change_neither_loss_nor_gradient(dtype: torch.dtype, chunk_elements: int) -> None:
    logits, labels = drawn(dtype)
    found = label_smoothed_cross_entropy(logits, labels, 0.2, chunk_elements=chunk_elements).loss_sum
    (gradient,) = torch.autograd.grad(0.01 * found, logits)
    dense = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.2)
    (expected,) = torch.autograd.grad(0.01 * dense, logits)
    torch.testing.assert_close(found, dense, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


class _LargestFloat32(TorchDispatchMode):
    """The most elements of a float32 tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype == torch.float32]
        self.elements = max([self.elements, *sizes])
        return result


def test_of_bfloat16_logits_only_a_chunk_is_ever_float32() -> None:
    logits, labels = drawn(torch.bfloat16)
    kept: list[Tensor] = []
    with _LargestFloat32() as mode:
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
            loss = label_smoothed_cross_entropy(logits, labels, 0.2, chunk_elements=5 * CLASSES).loss_sum
        (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == torch.bfloat16
    assert mode.elements == 5 * CLASSES
    beside = [t for t in kept if t.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr()]
    assert sum(tensor.numel() for tensor in beside if tensor.is_floating_point()) < CLASSES
