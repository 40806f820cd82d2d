"""Low-rank adapters in a frozen model, by peft."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sltscale.config import LoraSettings
from sltscale.errors import InputError

# What query, key, value and output layers of attention are called in mT5; mBART, Llama and most others; GPT-2.
ATTENTION = ("q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "c_attn")


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


def layers_called(model: nn.Module, names: Sequence[str] = ()) -> str:
    """The regular expression for ``add_lora`` of the layers called one of ``names``, by default those of attention.

    InputError, naming what the model has, if one of the names is no linear layer's.
    """
    found = {name.split(".")[-1] for name, module in model.named_modules() if _is_linear(module)}
    wanted = names or [name for name in ATTENTION if name in found]
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        raise InputError(
            f"method.lora_modules: the language model has no linear layer called {', '.join(unknown or ATTENTION)}; "
            f"it has {', '.join(sorted(found))}"
        )
    return rf"(.*\.)?({'|'.join(map(re.escape, wanted))})"


def _is_linear(module: nn.Module) -> bool:
    """Also GPT-2's, which are of transformers' own class."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
