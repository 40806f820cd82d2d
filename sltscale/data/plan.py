"""Which clips form which global batch, and which rank takes which of them.

A plan is a pure function of (clip lengths, seed, epoch, batch rule). Ranks, workers and processes come in only when a
global batch is dealt out, so a run can go on with another number of them and still take the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sltscale.errors import InputError
from sltscale.parallel import balanced_shares

Clips = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Waste:
    """What one epoch loses to unequal lengths, as shares of 1.

    padding: share of frames that would be padding if each rank padded its clips to its longest one.
    imbalance: mean over steps of (frames of the fullest rank / mean frames of a rank - 1).
    """

    padding: float
    imbalance: float


class Plan:
    """Global batches of a split, epoch after epoch.

    An epoch is a seeded permutation of all n clips, cut into ceil(n / global_batch) consecutive batches whose sizes
    differ by at most one: every clip exactly once, never a tiny last batch. Steps count from 0 through all epochs.

    lengths: frames of each clip as they will be used (after temporal sampling); balances the ranks, does not touch the
    batches. Raises InputError for an empty split, a negative seed or a global batch below 1.
    """

    def __init__(self, lengths: npt.ArrayLike, seed: int, global_batch: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) == 0:
            raise InputError(
                "the training split has no clips; expected at least one; pack it with tools/make_shards.py"
            )
        if global_batch < 1:
            raise InputError(f"global_batch is {global_batch}; expected at least 1")
        if seed < 0:
            raise InputError(f"seed is {seed}; expected 0 or more")
        self.seed = seed
        self.global_batch = global_batch
        self.batches_per_epoch = -(-len(self.lengths) // global_batch)
        self._cached: tuple[int, Clips] | None = None

    @property
    def smallest_batch(self) -> int:
        """Clips of the smallest global batch: the most ranks that can share a step."""
        return len(self.lengths) // self.batches_per_epoch

    def steps(self, epochs: int) -> int:
        return epochs * self.batches_per_epoch

    def epoch_of(self, step: int) -> int:
        return step // self.batches_per_epoch

    def batch(self, step: int) -> Clips:
        """Clip numbers of the global batch of ``step``, in the plan's order."""
        order = self._order(self.epoch_of(step))
        place, n = step % self.batches_per_epoch, len(order)
        return order[place * n // self.batches_per_epoch : (place + 1) * n // self.batches_per_epoch]

    def shares(self, step: int, world_size: int) -> list[Clips]:
        """The global batch of ``step`` dealt to ``world_size`` ranks, close in frames, at least one clip for each.

        Raises InputError if there are more ranks than clips in the smallest global batch.
        """
        self.check_world_size(world_size)
        batch = self.batch(step)
        return [batch[share] for share in balanced_shares(self.lengths[batch].tolist(), world_size)]

    def share(self, step: int, rank: int, world_size: int) -> Clips:
        """Clip numbers that ``rank`` takes of the global batch of ``step``."""
        return self.shares(step, world_size)[rank]

    def check_world_size(self, world_size: int) -> None:
        """InputError if some rank would get no clip in some step."""
        if world_size > self.smallest_batch:
            raise InputError(
                f"{world_size} ranks, but the smallest global batch has {self.smallest_batch} clips "
                f"(global_batch {self.global_batch}, {len(self.lengths)} clips); every rank needs at least one in each "
                f"step: start at most {self.smallest_batch} ranks or raise data.global_batch"
            )

    def padding_and_imbalance(self, epoch: int, world_size: int) -> Waste:
        """What ``epoch`` loses to unequal lengths with that many ranks."""
        padded = 0
        imbalances = []
        for step in range(epoch * self.batches_per_epoch, (epoch + 1) * self.batches_per_epoch):
            lengths = [self.lengths[share] for share in self.shares(step, world_size)]
            frames = [int(share.sum()) for share in lengths]
            padded += sum(len(share) * int(share.max()) for share in lengths)
            imbalances.append(max(frames) * world_size / sum(frames) - 1)
        return Waste(1 - int(self.lengths.sum()) / padded, float(np.mean(imbalances)))

    def _order(self, epoch: int) -> Clips:
        if self._cached is None or self._cached[0] != epoch:
            # numpy promises the raw words of a bit generator for all its versions, but not what Generator.permutation
            # makes of them; sorting the words keeps the order of a run across numpy versions.
            words = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,))).random_raw(len(self.lengths))
            self._cached = (epoch, np.argsort(words, kind="stable"))
        return self._cached[1]


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
