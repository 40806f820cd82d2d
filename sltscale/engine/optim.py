"""Optimizers, parameter groups by rule, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from sltscale.config import OptimSettings
from sltscale.errors import InputError


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: one per (part, decays or not), each with a name and its peak learning rate.

    A parameter belongs to the longest ``settings.groups`` part that is a prefix of its name, or to "all". 1-D
    parameters (biases, norms, the logit scale) are spared from weight decay, as in timm's optimizer factory.
    Raises InputError for a part that no parameter belongs to.
    """
    rates = {group.part: group.lr for group in settings.groups}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owners = [part for part in rates if name == part or name.startswith(f"{part}.")]
            part = max(owners, key=len, default="all")
            members.setdefault((part, settings.weight_decay > 0 and parameter.dim() > 1), []).append(parameter)
    unknown = rates.keys() - {part for part, _ in members}
    if unknown:
        parts = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        raise InputError(
            f"optim.groups names {', '.join(sorted(unknown))}, which no trained parameter belongs to; "
            f"the model's parts: {', '.join(parts)}"
        )
    return [
        {
            "name": f"{part}/{'decay' if decays else 'no_decay'}",
            "params": parameters,
            "peak_lr": rates.get(part, settings.lr),
            "lr": rates.get(part, settings.lr),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in members.items()
    ]


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)
    family = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
    return family(groups, lr=settings.lr, betas=settings.betas)


def learning_rate_factor(step: int, total_steps: int, settings: OptimSettings) -> float:
    """Multiplier of the peak learning rate at optimizer step ``step`` (0-based)."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    floor = settings.min_lr / settings.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Any, step: int, total_steps: int, settings: OptimSettings) -> float:
    """Set every group's rate for this step and return the recipe's main one."""
    factor = learning_rate_factor(step, total_steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return settings.lr * factor
