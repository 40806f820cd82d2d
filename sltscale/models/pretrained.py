"""Published weights by folder or hub name: safetensors only, complete, float32, or one clear line."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError

from sltscale.errors import InputError


def load_pretrained(model_class: Any, name: str, **options: Any) -> Any:
    """``model_class.from_pretrained(name)`` of a transformers class.

    InputError if the files are missing (or the machine is offline and has not got them), are not safetensors, or lack
    some of the model's weights.
    """
    try:
        model, report = model_class.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"pretrained weights {name!r} cannot be loaded ({reason}); expected a local folder or a hub name with "
            f"config.json and model.safetensors of a {model_class.__name__}; offline machines need the local folder"
        ) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"pretrained weights {name!r} lack {len(missing)} of the weights of a {model_class.__name__}, "
            f"the first is {missing[0]}; expected a complete checkpoint of that architecture"
        )
    return model
