"""What the attention of a recipe's model runs on: said no to before there is a model, set once there is one."""

from __future__ import annotations

import torch
from torch import nn

from sltscale.config import HFAVisualSettings, Recipe
from sltscale.errors import InputError
from sltscale.models.language_attention import attend_packed, check_packed
from sltscale.models.local_temporal import attention_backend


def check_attention(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
    """InputError, naming the field, if a backend that the recipe asks for cannot be had where it is to train.

    dtype: what the weights are in. Head widths and dropout of published language models are not known before they are
    loaded; ``set_attention`` looks at those.
    """
    _visual_backend(recipe, device, dtype)
    if recipe.train.attention is not None:
        try:
            check_packed(recipe.train.attention, device, dtype)
        except InputError as error:
            raise InputError(f"recipe {recipe.name}: train.attention: {error}") from None


def set_attention(recipe: Recipe, method: nn.Module, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Let ``method`` attend by what the recipe asks for, or by what is fastest; returns what that is, for the log.

    InputError, naming the field, if a model inside cannot do what is asked.
    """
    lines, visual = [], _visual_backend(recipe, device, dtype)
    if visual is not None:
        lines.append(f"attention on packed sequences by {visual}")
    try:
        found = attend_packed(method, device, dtype, recipe.train.attention)
    except InputError as error:
        raise InputError(f"recipe {recipe.name}: train.attention: {error}") from None
    return lines + [f"attention of {', '.join(names)} by {backend}" for backend, names in found.items()]


def _visual_backend(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> str | None:
    """Of the temporal encoder, where there is one that attends over packed sequences by itself."""
    visual = getattr(recipe.method, "visual", None)
    if not isinstance(visual, HFAVisualSettings):
        return None
    try:
        return attention_backend(visual.temporal, device, dtype)
    except InputError as error:
        raise InputError(f"recipe {recipe.name}: method.visual.temporal.attention: {error}") from None
