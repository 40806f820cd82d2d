"""Low-rank adapters in a frozen model, by peft."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sltscale.config import LoraSettings
from sltscale.errors import InputError


def add_lora(model: nn.Module, settings: LoraSettings, layers: str) -> None:
    """Freeze ``model`` and adapt, in place, the linear layers whose full names match the regular expression ``layers``.

    A layer ``x`` keeps its weights as ``x.base_layer``; the adapter is ``x.lora_A.default`` [rank, in] (Kaiming) and
    ``x.lora_B.default`` [out, rank] (zeros), so that nothing changes at first. With rank 0 all of ``model`` learns
    instead. InputError if no layer matches.
    """
    if settings.rank == 0:
        model.requires_grad_(True)
        return
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=layers
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no layer of {type(model).__name__} is called {layers} ({reason}); LoRA needs some") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
