"""Attention backends: which of them work here, and whether the ones that a recipe names do."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from sltscale.config import HFAVisualSettings, Recipe
from sltscale.diagnosis.finding import Finding
from sltscale.errors import InputError
from sltscale.methods.attention import check_attention
from sltscale.models.attention import BACKENDS, choose_backend, packed_attention

HEAD_DIM = 64
TOLERANCE = 0.05  # of bfloat16 against the reference in float32; a wrong kernel is off by more than 1


def attention(recipe: Recipe | None) -> Iterator[Finding]:
    """Every backend that can run here, compared with the reference on two short sequences."""
    device, dtype = _where()
    usable, absent = [], []
    for name in BACKENDS:
        try:
            choose_backend(device, dtype, HEAD_DIM, backend=name)
        except InputError:
            absent.append(name)
            continue
        difference = _difference(name, device, dtype)
        if difference > TOLERANCE:
            found = f"{name} is off by {difference:.2g} from the reference"
            yield Finding("attention", "fault", found, "install 'sltscale[cuda]' again, or name another backend")
        else:
            usable.append(name)
    without = f"; without {', '.join(absent)}" if absent else ""
    yield Finding("attention", "ok", f"{', '.join(usable)} agree on {device.type} in {_name(dtype)}{without}")
    if recipe is not None:
        yield from _asked_for(recipe, device, dtype)


def _asked_for(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    asked = {"train.attention": recipe.train.attention}
    visual = getattr(recipe.method, "visual", None)
    if isinstance(visual, HFAVisualSettings):
        asked["method.visual.temporal.attention"] = visual.temporal.attention
    named = [f"{field} {backend}" for field, backend in asked.items() if backend is not None]
    if not named:
        return
    subject = "attention of the recipe"
    try:
        check_attention(recipe, device, dtype)
        yield Finding(subject, "ok", ", ".join(named))
    except InputError as error:
        field, _, message = str(error).removeprefix(f"recipe {recipe.name}: ").partition(": ")
        found, *rest = re.split("[:;] ", message, maxsplit=1)
        remedy = f"{rest[0] if rest else 'name another'} (--{field} NAME)"
        yield Finding(subject, "fault", f"{field}: {found}", remedy)


def _where() -> tuple[torch.device, torch.dtype]:
    """What training runs in: bfloat16 on a GPU, float32 on CPUs."""
    return (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)


def _difference(name: str, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 24, 2, HEAD_DIM, generator=generator)
    ends = torch.tensor([0, 9, 24], dtype=torch.int32)
    expected = packed_attention(query, key, value, ends, 15, backend="reference")
    q, k, v = (tensor.to(device, dtype) for tensor in (query, key, value))
    found = packed_attention(q, k, v, ends.to(device), 15, backend=name)
    return float((found.float().cpu() - expected).abs().max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
