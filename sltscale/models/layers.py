"""Layers that mean the same on one process and on many: batch norm over the global batch, the contrastive scale.

Letters: N packed items of this rank, C features, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from sltscale import parallel


def _channels_last(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _over_ranks(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, (biased) variance and count of all ranks' items, by Chan's formula: only differences are squared.

    One collective: every rank fills its own row of a [W, 2C+1] table of zeros, and the tables are summed.
    """
    mine = torch.cat([mean, variance, mean.new_full((1,), count)])
    table = mine.new_zeros(parallel.world_size(), len(mine))
    table[parallel.rank()] = mine
    means, variances, counts = parallel.sum_over_ranks(table).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (counts * (variances + (means - mean).square())).sum(0) / total, total


class _TrainingBatchNorm(torch.autograd.Function):
    """Batch norm with the statistics of all ranks' items; the gradients of weight and bias are this rank's own sums
    (the engine averages parameter gradients over the ranks), that of the input knows all ranks.

    Composed of torch's own kernels; on CPU as fast as its fused single-process batch norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        x = x.contiguous(memory_format=_channels_last(x))
        count = x.numel() // x.shape[1]
        # The kernel returns mean and biased variance in the dtype of the running statistics it is handed; those here
        # are thrown away, as the true ones need the other ranks.
        unused = torch.zeros_like(running_mean)
        mean, variance = torch.batch_norm_update_stats(x, unused, unused.clone(), momentum)
        total = mean.new_full((), count)
        if parallel.is_distributed():
            mean, variance, total = _over_ranks(mean, variance, count)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (total / (total - 1).clamp(min=1)), momentum)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance, total = ctx.saved_tensors
        gradient = gradients[0].contiguous(memory_format=_channels_last(x))
        # Asked as if the statistics were constants, the kernel gives the plain sums of gradient * x_hat and gradient.
        _, weight_sum, bias_sum = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        if not ctx.needs_input_grad[0]:
            return None, weight_sum, bias_sum, None, None, None, None
        weight_mean, bias_mean = parallel.sum_over_ranks(torch.stack([weight_sum, bias_sum])) / total
        # dx = scale (dy - bias_mean - x_hat weight_mean), written as offset + slope x + scale dy: no x_hat is stored.
        inverse = (variance + ctx.eps).rsqrt()
        scale = weight * inverse
        slope = -scale * inverse * weight_mean
        offset = -scale * bias_mean - slope * mean
        shape = (1, -1, *[1] * (x.dim() - 2))
        x_gradient = torch.addcmul(offset.view(shape), x, slope.view(shape)).addcmul_(gradient, scale.view(shape))
        return x_gradient.to(x.dtype), weight_sum, bias_sum, None, None, None, None


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of [N, C] or [N, C, H, W] whose training statistics are those of the global batch.

    Equals nn.BatchNorm1d/2d of one process that holds all ranks' items - outputs, buffers, gradients - for any split
    of the items over the ranks. Same state-dict names. Works on CPU (gloo) and GPU. Statistics are kept and computed
    in float32 (float64 in a float64 model) also where the model is cast to bfloat16.

    counting: False while a batch is encoded that will come again, so that it is not in the buffers twice.
    """

    counting = True

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1, device: Any = None) -> None:
        super().__init__(features, eps, momentum, device=device)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and variance is not None and self.momentum is not None
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        if not self.training:
            return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=self.eps)
        if not self.counting:
            mean, variance = mean.clone(), variance.clone()
        elif self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # torch refuses a single item per channel, as one clip of one frame brings; ours then returns the bias.
        if not parallel.is_distributed() and x.numel() > x.shape[1]:
            return F.batch_norm(x, mean, variance, weight, bias, True, self.momentum, self.eps)
        result: Tensor = _TrainingBatchNorm.apply(x, weight, bias, mean, variance, self.momentum, self.eps)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalBatchNorm:
        """Casts and moves (``.to``, ``.bfloat16()``) reach the parameters; the statistics move, but stay float32:
        in bfloat16 a momentum update below 1/256 of the value would be lost."""
        before = self.running_mean, self.running_var
        super()._apply(fn, recurse)
        for name, old in zip(("running_mean", "running_var"), before, strict=True):
            new = getattr(self, name)
            if old is not None and new.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, old.to(new.device))
        return self


class FrozenBatchNorm(GlobalBatchNorm):
    """Batch norm whose statistics, weight and bias stay as they were loaded; a fixed affine map per channel."""

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1, device: Any = None) -> None:
        super().__init__(features, eps, momentum, device=device)
        super().train(False)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        return self


def choose_norm(module: nn.Module, norm: Literal["batch", "frozen", "layer"]) -> None:
    """Make every GlobalBatchNorm inside ``module`` what the recipe wants, under the same names.

    "frozen" keeps values and statistics for good; "layer" normalises each item over its own channels (and pixels), so
    that nothing depends on the batch.
    """
    if norm == "batch":
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, GlobalBatchNorm):
                if norm == "frozen":
                    new: nn.Module = FrozenBatchNorm(child.num_features, child.eps, device="meta")
                    new.load_state_dict(child.state_dict(), assign=True)
                    new.requires_grad_(False)
                else:
                    new = nn.GroupNorm(1, child.num_features, child.eps)
                setattr(parent, name, new)


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Inside the block batch norms normalise as before, but do not count what they see."""
    norms = [part for part in module.modules() if isinstance(part, GlobalBatchNorm)]
    for norm in norms:
        norm.counting = False
    try:
        yield
    finally:
        for norm in norms:
            norm.counting = True


def use_global_batch_norm(module: nn.Module) -> None:
    """Replace every nn.BatchNorm1d/2d inside ``module`` by a GlobalBatchNorm with its values, under the same names."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                if child.momentum is None or not (child.affine and child.track_running_stats):
                    raise ValueError(f"{name}: only affine batch norms with a momentum can be replaced, found {child}")
                new = GlobalBatchNorm(child.num_features, child.eps, child.momentum, device="meta")
                new.load_state_dict(child.state_dict(), assign=True)
                setattr(parent, name, new)


class _Cap(torch.autograd.Function):
    """min(value, ceiling). Above the ceiling the gradient passes if a step along it leads down, so that a value that
    overshot can come back; torch.clamp would hold it there for ever."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ceiling: float) -> Tensor:
        ctx.above = value > ceiling
        return value.clamp(max=ceiling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        return gradient.masked_fill(ctx.above & (gradient < 0), 0), None


class LogitScale(nn.Module):
    """The learned factor of a contrastive loss: exp(theta) <= ``maximum``, theta starts at
    ln(1 / ``temperature``), by default CLIP's.

    theta has shape [1], as DeepSpeed cannot broadcast 0-dimensional parameters, and is capped in the forward: a clamp
    of the parameter would not reach ZeRO's float32 masters.
    """

    def __init__(self, maximum: float, temperature: float = 0.07) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((1,), math.log(1 / temperature)))
        self.ceiling = math.log(maximum)

    def forward(self) -> Tensor:
        """The factor itself, float32 [1] (float64 in a float64 model)."""
        theta = self.theta if self.theta.dtype == torch.float64 else self.theta.float()
        capped: Tensor = _Cap.apply(theta, self.ceiling)
        return capped.exp()
