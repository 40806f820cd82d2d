"""Clips compared in groups, as large as what one GPU of a published run held, whatever the number of ranks.

N: clips of the global batch, n of them this rank's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sltscale import parallel

MIXING = (-4658895280553007687, -7723592293110705685)  # of SplitMix64, as signed numbers


def clip_keys(ids: Sequence[str], device: torch.device) -> Tensor:
    """int64 [n], by which clips are dealt into groups."""
    digests = (hashlib.blake2b(clip.encode(), digest_size=8).digest() for clip in ids)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], device=device)


def gathered_groups(keys: Tensor, size: int) -> Tensor:
    """Group numbers [N] of the clips of all ranks, whose own keys are [n]; a collective."""
    keys = keys[:, None]
    gathered, _, _ = parallel.gather(keys[..., None], torch.ones_like(keys))
    return group_clips(gathered[:, 0, 0], size)


def group_clips(keys: Tensor, size: int) -> Tensor:
    """Group numbers [N] of a global batch's clips, whose keys are int64 [N]: N // size random groups of nearly equal
    size, at least one; a function of the set of clips, whatever order the ranks bring them in."""
    mixed = keys ^ keys.sum()  # clips that meet in one global batch must not do so in every one that holds both
    for factor in MIXING:
        mixed = mixed * factor
        mixed = mixed ^ (mixed >> 29)
    place = mixed.argsort().argsort()
    return place * max(1, len(keys) // size) // len(keys)
