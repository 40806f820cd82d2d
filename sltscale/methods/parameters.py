"""How many parameters a recipe's method has, by module, and how that compares with what its paper counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sltscale.config import MethodSettings
from sltscale.methods.base import Vocabulary, build_method


@dataclass(frozen=True)
class Counted:
    """rows: (module, trainable, total), the whole model last. as_published: one line about the published count, if that
    is made up of other things."""

    rows: list[tuple[str, int, int]]
    as_published: str | None


def count(settings: MethodSettings, vocabulary: int, pseudo_glosses: int | None = None) -> Counted:
    """Parameters of the method with that many token ids and pseudo-glosses, each once where several modules share it.

    Built without memory, so that the largest takes a second. A parameter counts for the first module that holds it.
    """
    with torch.device("meta"):
        method = build_method(settings, Vocabulary(vocabulary, 1, 2, pseudo_glosses or 0))
    rows: dict[str, tuple[int, int]] = {}
    for name, parameter in method.named_parameters():
        trainable, total = rows.get(name.split(".")[0], (0, 0))
        number = parameter.numel()
        rows[name.split(".")[0]] = trainable + number * parameter.requires_grad, total + number
    trainable, total = (sum(numbers) for numbers in zip(*rows.values(), strict=True))
    published = total - sum(rows[name][1] for name in method.counted_apart) + sum(method.unread_embeddings.values())
    reasons = [f"without {name}, which is counted apart" for name in method.counted_apart]
    reasons += [
        f"with {name} of {size} parameters, which nothing reads" for name, size in method.unread_embeddings.items()
    ]
    return Counted(
        [*((name, *numbers) for name, numbers in rows.items()), ("all", trainable, total)],
        f"as published: {published} ({'; '.join(reasons)})" if reasons else None,
    )
