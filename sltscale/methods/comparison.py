"""Which clips of the global batch a clip is compared with, and which of their sentences are as good as its own.

N: clips of the global batch, n of them this rank's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sltscale import parallel
from sltscale.config import ComparisonSettings
from sltscale.structures import VideoBatch

MIXING = (-4658895280553007687, -7723592293110705685)  # of SplitMix64, as signed numbers


def comparison_rows(settings: ComparisonSettings, batch: VideoBatch, device: torch.device) -> dict[str, Tensor]:
    """What ``gathered_comparison`` needs to know of this rank's clips, int64 [n] each."""
    rows = {}
    if settings.group_size is not None:
        rows["key"] = keys_of(batch.ids, device)
    if settings.duplicates == "positives":
        said = [f"{language} {text}" for language, text in zip(batch.languages, batch.texts, strict=True)]
        rows["sentence"] = keys_of(said, device)
    return rows


def gathered_comparison(settings: ComparisonSettings, rows: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """(groups, text_ids) of the clips of all ranks, [N] or none, as the losses take them; a collective."""
    groups, text_ids = None, None
    if settings.group_size is not None:
        groups = group_clips(_gather(rows["key"]), settings.group_size)
    if settings.duplicates == "positives":
        text_ids = _gather(rows["sentence"])
    return groups, text_ids


def group_clips(keys: Tensor, size: int) -> Tensor:
    """Group numbers [N] of a global batch's clips, whose keys are int64 [N]: N // size random groups of nearly equal
    size, at least one; a function of the set of clips, whatever order the ranks bring them in."""
    mixed = keys ^ keys.sum()  # clips that meet in one global batch must not do so in every one that holds both
    for factor in MIXING:
        mixed = mixed * factor
        mixed = mixed ^ (mixed >> 29)
    place = mixed.argsort().argsort()
    return place * max(1, len(keys) // size) // len(keys)


def keys_of(names: Sequence[str], device: torch.device) -> Tensor:
    """int64 [n], equal for equal names."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], device=device)


def _gather(keys: Tensor) -> Tensor:
    keys = keys[:, None]
    gathered, _, _ = parallel.gather(keys[..., None], torch.ones_like(keys))
    return gathered[:, 0, 0]
