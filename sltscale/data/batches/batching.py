"""From an epoch's order of clips to its batches: by number of clips, by frames, or both; similar lengths together.

Pure functions of their arguments; neither ranks nor workers come in. Letters: n clips of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from sltscale.config import DataSettings
from sltscale.errors import InputError

Clips = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchRule:
    """What a global batch may hold.

    clips: at most this many. frames: at most this many even if every clip were padded to the longest (clips x longest).
    window: clips of similar length go together, chosen from this many consecutive ones of the epoch's order (0: none
    are looked for). multiple: with ``frames``, numbers of clips are multiples of it where the budget holds so many, so
    that this many ranks (or a divisor of it) get equal shares. shuffle: an epoch's order is drawn; or every epoch's is
    that of the clips' numbers.
    """

    clips: int | None = None
    frames: int | None = None
    window: int = 0
    multiple: int = 1
    shuffle: bool = True

    @classmethod
    def of(cls, settings: DataSettings) -> BatchRule:
        rule = (settings.global_batch, settings.global_frames, settings.bucket_window, settings.batch_multiple)
        return cls(*rule, shuffle=settings.shuffle)

    def check(self, longest: int) -> None:
        """InputError for a rule that no batch can follow; ``longest``: frames of the longest clip."""
        if self.clips is None and self.frames is None:
            raise InputError("no batch rule; expected data.global_batch (clips), data.global_frames, or both")
        if self.clips is not None and self.clips < 1:
            raise InputError(f"global_batch is {self.clips}; expected at least 1")
        if self.frames is not None and self.frames < longest:
            raise InputError(
                f"global_frames is {self.frames}, but the longest clip has {longest}; raise it or lower data.max_frames"
            )


def cut(order: Clips, lengths: npt.NDArray[np.int64], rule: BatchRule) -> list[Clips]:
    """The epoch's batches, each clip of ``order`` [n] once. lengths: frames by clip number.

    By clips alone: ceil(n / clips) batches whose sizes differ by at most one. By frames: as many clips as the budget
    holds; no batch is smaller than ``smallest(...)`` says except, where the clips left over in the end fit nowhere,
    a last one.
    """
    if rule.frames is None:
        assert rule.clips is not None
        if rule.window:
            parts = [order[i : i + rule.window] for i in range(0, len(order), rule.window)]
            order = np.concatenate([_longest_first(part, lengths) for part in parts])
        count = -(-len(order) // rule.clips)
        bounds = [place * len(order) // count for place in range(count + 1)]
        return [order[a:b] for a, b in pairwise(bounds)]
    return _cut_by_frames(order, lengths, rule, rule.frames)


def _longest_first(clips: Clips, lengths: npt.NDArray[np.int64]) -> Clips:
    """Ties stay in the epoch's order."""
    return clips[np.argsort(-lengths[clips], kind="stable")]


def _cut_by_frames(order: Clips, lengths: npt.NDArray[np.int64], rule: BatchRule, budget: int) -> list[Clips]:
    batches: list[Clips] = []
    rest = order[:0]
    for begin in range(0, len(order), rule.window or 1):
        pool = np.concatenate([rest, order[begin : begin + (rule.window or 1)]])
        pool = _longest_first(pool, lengths)
        taken = 0
        while taken < len(pool) and (size := _room(int(lengths[pool[taken]]), rule, budget)) <= len(pool) - taken:
            batches.append(pool[taken : taken + size])
            taken += size
        rest = pool[taken:]  # the shortest ones go on into the next window
    # What is left at the epoch's end is less than one full batch.
    size = len(rest) // rule.multiple * rule.multiple
    if size:
        batches.append(rest[:size])
    return _place(rest[size:], batches, lengths, rule, budget)


def _room(longest: int, rule: BatchRule, budget: int) -> int:
    """Clips of a batch whose longest clip has ``longest`` frames."""
    size = budget // longest if rule.clips is None else min(rule.clips, budget // longest)
    return size // rule.multiple * rule.multiple or size


def _place(
    rest: Clips, batches: list[Clips], lengths: npt.NDArray[np.int64], rule: BatchRule, budget: int
) -> list[Clips]:
    """Spread the fewer than ``multiple`` clips that are left over the batches that still have room, shortest first."""
    left = list(rest)
    for number in range(len(batches) - 1, -1, -1):
        batch = batches[number]
        longest = int(lengths[batch].max())
        limit = budget // longest if rule.clips is None else min(rule.clips, budget // longest)
        fitting = [clip for clip in left if lengths[clip] <= longest][: max(0, limit - len(batch))]
        if fitting:
            batches[number] = np.concatenate([batch, np.array(fitting, dtype=np.int64)])
            left = [clip for clip in left if clip not in fitting]
        if not left:
            break
    if left:
        batches.append(np.array(left, dtype=np.int64))
    return batches
