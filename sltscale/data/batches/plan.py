"""Which clips form which global batch, and which rank takes which of them.

A plan is a pure function of (clip lengths, seed, epoch, batch rule). Ranks, workers and processes come in only when a
global batch is dealt out, so a run can go on with another number of them and still take the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sltscale.data.batches.batching import BatchRule, Clips, cut
from sltscale.data.batches.dealing import micro_shares
from sltscale.errors import InputError

PLANNED_EPOCHS = 2  # kept: workers read ahead into the next one
WASTE_STEPS = 400


@dataclass(frozen=True)
class Waste:
    """What one epoch loses to unequal lengths, as shares of 1.

    padding: share of frames that would be padding if each rank padded its clips to its longest one.
    imbalance: mean over steps of (frames of the fullest rank / mean frames of a rank - 1).
    """

    padding: float
    imbalance: float


@dataclass(frozen=True)
class Part:
    """Clips of one corpus in a mixture. clips: their numbers. quota: how many of them an epoch takes.

    A part is walked through in permutations of its own, one after the other without regard to epochs, so that over
    several epochs each of its clips comes equally often, whatever the quota.
    """

    clips: Clips
    quota: int


class Plan:
    """Global batches of a split, epoch after epoch.

    An epoch takes ``quota`` clips of every part (every clip exactly once, unless ``parts`` says otherwise), in an order
    drawn from (seed, epoch), cut into batches by the rule. Batches of similar lengths are shuffled. Steps count from 0
    through all epochs.

    lengths: frames of each clip as they will be used (after temporal sampling), by clip number. parts: None means one,
    of all clips. micro_frames: most frames of a micro-batch, at least twice the longest clip. Raises InputError for an
    empty split, a negative seed or a rule that cannot be followed.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        seed: int,
        rule: BatchRule,
        *,
        parts: Sequence[Part] | None = None,
        micro_frames: int | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.parts = [Part(np.arange(len(self.lengths)), len(self.lengths))] if parts is None else list(parts)
        self.clips_per_epoch = sum(part.quota for part in self.parts)
        if self.clips_per_epoch == 0:
            raise InputError(
                "the training split has no clips; expected at least one; pack it with tools/make_shards.py"
            )
        if seed < 0:
            raise InputError(f"seed is {seed}; expected 0 or more")
        rule.check(int(max(self.lengths[part.clips].max() for part in self.parts if len(part.clips))))
        self.seed, self.rule, self.micro_frames = seed, rule, micro_frames
        self._ends: list[int] = []  # steps done at the end of each epoch, as far as they were asked for
        self._smallest: list[int] = []
        self._planned: dict[int, list[Clips]] = {}

    def steps(self, epochs: int) -> int:
        """Steps of the first ``epochs`` epochs."""
        if self.rule.frames is None:
            return epochs * self._batches_by_clips
        while len(self._ends) < epochs:
            batches = self._batches(len(self._ends))
            self._ends.append((self._ends[-1] if self._ends else 0) + len(batches))
            self._smallest.append(min(map(len, batches)))
        return self._ends[epochs - 1] if epochs else 0

    def epoch_of(self, step: int) -> int:
        """The epoch that ``step`` belongs to; also the number of whole epochs done before it."""
        if self.rule.frames is None:
            return step // self._batches_by_clips
        while not self._ends or self._ends[-1] <= step:
            self.steps(len(self._ends) + 1)
        return int(np.searchsorted(self._ends, step, side="right"))

    def batch(self, step: int) -> Clips:
        """Clip numbers of the global batch of ``step``, in the plan's order."""
        epoch = self.epoch_of(step)
        return self._batches(epoch)[step - self.steps(epoch)]

    def smallest_batch(self, epochs: int) -> int:
        """Clips of the smallest global batch of the first ``epochs`` epochs: the most ranks that can share a step."""
        if self.rule.frames is None:
            return self.clips_per_epoch // self._batches_by_clips
        self.steps(epochs)
        return min(self._smallest[:epochs])

    def shares(self, step: int, world_size: int) -> list[Clips]:
        """The global batch of ``step`` dealt to ``world_size`` ranks, close in frames, at least one clip for each."""
        return [np.concatenate(parts) for parts in self.micro_batches(step, world_size)]

    def micro_batches(self, step: int, world_size: int) -> list[list[Clips]]:
        """Each rank's share of ``step`` as micro-batches within ``micro_frames``, as many on every rank."""
        batch = self.batch(step)
        dealt = micro_shares(self.lengths[batch].tolist(), world_size, self.micro_frames)
        return [[batch[part] for part in parts] for parts in dealt]

    def share(self, step: int, rank: int, world_size: int) -> Clips:
        """Clip numbers that ``rank`` takes of the global batch of ``step``."""
        return self.shares(step, world_size)[rank]

    def check_world_size(self, world_size: int, epochs: int) -> None:
        """InputError if some rank would get no clip in some step of the first ``epochs`` epochs."""
        smallest = self.smallest_batch(epochs)
        if world_size > smallest:
            rule = f"global_batch {self.rule.clips}, global_frames {self.rule.frames}"
            raise InputError(
                f"{world_size} ranks, but the smallest global batch has {smallest} clips "
                f"({rule}, {self.clips_per_epoch} clips an epoch); every rank needs at least one in each "
                f"step: start at most {smallest} ranks or raise data.global_batch or data.global_frames"
            )

    def state(self, step: int) -> dict[str, int]:
        """Where a run stands that has done ``step`` steps: the same on all ranks, and for any number of them.

        seed, epoch, clips (consumed in that epoch).
        """
        epoch = self.epoch_of(step)
        done = self._batches(epoch)[: step - self.steps(epoch)]
        return {"seed": self.seed, "epoch": epoch, "clips": sum(map(len, done))}

    def step_at(self, state: dict[str, Any]) -> int:
        """The step to go on with, from ``state``; InputError if this plan never stands there (other data or rule)."""
        step = self.steps(state["epoch"])
        consumed = 0
        for batch in self._batches(state["epoch"]):
            if consumed >= state["clips"]:
                break
            consumed += len(batch)
            step += 1
        if (state["seed"], state["clips"]) != (self.seed, consumed):
            raise InputError(f"the position {state} is not one of this plan's; seed, clips or batch rule have changed")
        return step

    def padding_and_imbalance(self, epoch: int, world_size: int) -> Waste:
        """What ``epoch`` loses to unequal lengths with that many ranks, from about WASTE_STEPS of its steps."""
        frames = padded = 0
        imbalances = []
        first, end = self.steps(epoch), self.steps(epoch + 1)
        for step in range(first, end, max(1, (end - first) // WASTE_STEPS)):
            lengths = [self.lengths[share] for share in self.shares(step, world_size)]
            sums = [int(share.sum()) for share in lengths]
            frames += sum(sums)
            padded += sum(len(share) * int(share.max()) for share in lengths)
            imbalances.append(max(sums) * world_size / sum(sums) - 1)
        return Waste(1 - frames / padded, float(np.mean(imbalances)))

    @property
    def _batches_by_clips(self) -> int:
        assert self.rule.clips is not None
        return -(-self.clips_per_epoch // self.rule.clips)

    def _batches(self, epoch: int) -> list[Clips]:
        if epoch not in self._planned:
            batches = cut(self._order(epoch), self.lengths, self.rule)
            if self.rule.window:
                batches = [batches[place] for place in _permutation(len(batches), self.seed, (epoch, 0, 1))]
            self._planned = dict(list(self._planned.items())[1 - PLANNED_EPOCHS :])
            self._planned[epoch] = batches
        return self._planned[epoch]

    def _order(self, epoch: int) -> Clips:
        drawn = [self._drawn(number, epoch) for number in range(len(self.parts))]
        if len(drawn) == 1:
            return drawn[0]
        return np.concatenate(drawn)[_permutation(self.clips_per_epoch, self.seed, (epoch, 0, 0))]

    def _drawn(self, number: int, epoch: int) -> Clips:
        """What ``epoch`` takes of a part: the next ``quota`` places in its endless row of permutations."""
        part = self.parts[number]
        begin, size = epoch * part.quota, len(part.clips)
        taken = []
        place = begin
        while place < begin + part.quota:
            turn, first = divmod(place, size)
            until = min(size, first + begin + part.quota - place)
            if self.rule.shuffle:
                order = _permutation(size, self.seed, (turn, number) if number else (turn,))
                taken.append(part.clips[order[first:until]])
            else:
                taken.append(part.clips[first:until])
            place += until - first
        return np.concatenate(taken) if taken else part.clips[:0]


def _permutation(size: int, seed: int, key: tuple[int, ...]) -> Clips:
    # numpy promises the raw words of a bit generator for all its versions, but not what Generator.permutation makes of
    # them; sorting the words keeps the order of a run across numpy versions.
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(size)
    return np.argsort(words, kind="stable")
