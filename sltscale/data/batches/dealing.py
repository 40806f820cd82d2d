"""Dealing clips to ranks: of a training batch close in frames, of a split for evaluation every clip exactly once."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def balanced_shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal items to ranks so that the ranks' sums of ``lengths`` come out close: longest first, to the lightest rank.

    Returns one list of positions into ``lengths`` per rank, each ascending. Deterministic; every rank gets at least one
    item when there are enough (empty ranks are the lightest).
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, 0, r) for r in range(ranks)]
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, items, r = heapq.heappop(heap)
        shares[r].append(position)
        heapq.heappush(heap, (load + lengths[position], items + 1, r))
    return [sorted(share) for share in shares]


def micro_shares(lengths: Sequence[int], ranks: int, budget: int | None) -> list[list[list[int]]]:
    """For each rank the micro-batches of its share: as few as it takes for none to exceed ``budget``, as many on every
    rank, none of them empty. Positions into ``lengths``; one micro-batch a rank without a budget.

    There is a way whenever the budget holds any two items and there are at least as many items as ranks.
    """
    if budget is None:
        return [[share] for share in balanced_shares(lengths, ranks)]
    for count in range(max(1, sum(lengths) // (ranks * budget)), len(lengths) // ranks + 1):
        parts = balanced_shares(lengths, ranks * count)
        loads = [sum(lengths[position] for position in part) for part in parts]
        if max(loads) <= budget:
            order = sorted(range(len(parts)), key=lambda part: (-loads[part], part))
            dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
            for place, part in enumerate(order):  # to and fro, so that heavy and light ones come together
                turn, r = divmod(place, ranks)
                dealt[r if turn % 2 == 0 else ranks - 1 - r].append(parts[part])
            return dealt
    raise ValueError(f"{len(lengths)} items of up to {max(lengths)} cannot be dealt to {ranks} ranks within {budget}")


def evaluation_shares(
    lengths: Sequence[int] | npt.NDArray[np.integer], world_size: int, batch: int
) -> list[list[list[int]]]:
    """Deal every clip of a split exactly once: for each rank a list of batches of at most ``batch`` clip numbers.

    Clips are sorted by length (longest first, so that what does not fit in memory fails at once; ties in the split's
    order) and dealt one by one, which keeps padding small and the ranks' clips within one of each other. With fewer
    clips than ranks the last ranks get none.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    dealt = [order[rank::world_size].tolist() for rank in range(world_size)]
    return [[clips[start : start + batch] for start in range(0, len(clips), batch)] for clips in dealt]
