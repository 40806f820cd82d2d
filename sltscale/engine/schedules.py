"""Learning rates, momenta and who is updated: all functions of the step, so that there is no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sltscale.config import OneCycleSettings, OptimSettings
from sltscale.data.batches.plan import Plan


@dataclass(frozen=True)
class Progress:
    """Where a run stands before an optimizer step (0-based), and how long it is."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    step_in_epoch: int

    @classmethod
    def of(cls, plan: Plan, step: int, epochs: int) -> Progress:
        epoch = plan.epoch_of(step)
        return cls(step, plan.steps(epochs), epoch, epochs, step - plan.steps(epoch))


def learning_rate_factor(progress: Progress, settings: OptimSettings) -> float:
    """Multiplier of the peak learning rate ``settings.lr``."""
    if progress.step < settings.warmup_steps:
        return (progress.step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "one_cycle":
        cycle = settings.one_cycle
        start = 1 / cycle.start_divisor
        return _one_cycle(progress, cycle, start, 1.0, start / cycle.end_divisor)
    if settings.schedule == "cosine":
        done = (progress.step - settings.warmup_steps) / max(1, progress.total_steps - settings.warmup_steps)
    else:
        # timm's cosine and torch's CosineAnnealingLR are stepped after an epoch with that epoch's number.
        done = max(progress.epoch - 1, 0) / progress.epochs
    floor = settings.min_lr / settings.lr if settings.min_lr else 0.0
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _one_cycle(progress: Progress, cycle: OneCycleSettings, first: float, middle: float, last: float) -> float:
    """torch's OneCycleLR: two halves of a cosine, from ``first`` to ``middle`` and on to ``last``."""
    turn, end = cycle.warmup_share * progress.total_steps - 1, progress.total_steps - 1
    if progress.step <= turn:
        return _cosine(first, middle, progress.step / turn if turn else 1.0)
    return _cosine(middle, last, (progress.step - turn) / (end - turn))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: Any, progress: Progress, settings: OptimSettings) -> float:
    """Set what holds in this step for every group, and return the recipe's main learning rate."""
    for group in optimizer.param_groups:
        own = settings if group["rule"] is None else settings.of_group(settings.groups[group["rule"]])
        group["lr"] = group["peak_lr"] * learning_rate_factor(progress, own)
        group["due"] = progress.step_in_epoch % group["period"] == 0
        if own.schedule == "one_cycle" and own.one_cycle.momentum is not None:
            low, high = own.one_cycle.momentum
            momentum = _one_cycle(progress, own.one_cycle, high, low, high)
            if own.name == "sgd":
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, own.betas[1])
    return settings.lr * learning_rate_factor(progress, settings)
