"""From the ranks' sums and counts to the loss of the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sltscale import parallel
from sltscale.structures import LossOutput, VideoBatch


@dataclass(frozen=True)
class Totals:
    """One step over all ranks: the total loss and its parts as means over the global batch, the metrics as means over
    the ranks, frames, reads that had to be tried again, and whether any rank was asked to stop."""

    losses: dict[str, float]
    metrics: dict[str, float]
    frames: int
    retries: int
    stop: bool


def global_loss(
    outputs: dict[str, LossOutput], weights: dict[str, float], batch: VideoBatch, stop: bool
) -> tuple[Tensor, Totals]:
    """The loss to back-propagate on this rank, and the step's totals, from one all-reduce.

    Each part is a sum over this rank's items; its mean is over the *global* batch, so the sum is divided by the count
    over all ranks.
    """
    names = sorted(outputs)
    metrics = [(name, key) for name in names for key in sorted(outputs[name].metrics)]
    numbers = [
        *(outputs[name].loss_sum for name in names),
        *(outputs[name].count for name in names),
        *(outputs[name].metrics[key] for name, key in metrics),
        torch.tensor(batch.frames.values.shape[0]),
        torch.tensor(batch.retries),
        torch.tensor(stop),
    ]
    device = outputs[names[0]].loss_sum.device
    totals = torch.stack([number.detach().reshape(()).to(device, torch.float64) for number in numbers])
    if parallel.is_distributed():
        dist.all_reduce(totals)
    values = totals.tolist()
    sums, counts = dict(zip(names, values, strict=False)), dict(zip(names, values[len(names) :], strict=False))
    means = {name: sums[name] / counts[name] for name in names}
    world_size = parallel.world_size()
    # The engine averages gradients over the ranks; the factor world_size undoes that, for the sum is what is meant.
    loss = torch.stack([weights[name] * world_size * outputs[name].loss_sum / counts[name] for name in names]).sum()
    return loss, Totals(
        losses={"loss": sum(weights[name] * means[name] for name in names), **means},
        metrics={
            f"{name}/{key}": value / world_size
            for (name, key), value in zip(metrics, values[2 * len(names) :], strict=False)
        },
        frames=round(values[-3]),
        retries=round(values[-2]),
        stop=values[-1] > 0,
    )
