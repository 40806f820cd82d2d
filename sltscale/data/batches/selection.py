"""The clips that a run works on, under one row of numbers: of one index or several, less those that are damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sltscale.data.batches.plan import Part
from sltscale.data.shards.index import Index
from sltscale.errors import InputError

Numbers = npt.NDArray[np.int64]


class Selection:
    """Clips 0 ... n - 1: those of the first index in its order, then those of the second, and so on.

    without: for each index, numbers of its clips that are left out. frames [n]: as stored, tokens of features. May be
    sent to other processes.
    """

    def __init__(self, indexes: Sequence[Index], without: Sequence[Iterable[int]] = ()) -> None:
        self.indexes = list(indexes)
        self.without = [sorted(set(numbers)) for numbers in without] or [[] for _ in self.indexes]
        self._kept: list[Numbers] = [
            np.setdiff1d(np.arange(len(index)), np.array(numbers, dtype=np.int64))
            for index, numbers in zip(self.indexes, self.without, strict=True)
        ]
        self._starts = np.cumsum([0, *map(len, self._kept)])
        frames = [index.frames[kept] for index, kept in zip(self.indexes, self._kept, strict=True)]
        self.frames: npt.NDArray[np.int32] = np.concatenate(frames)

    @classmethod
    def joined(cls, selections: Sequence[Selection]) -> Selection:
        """The clips of all of them, in this order."""
        parts = [
            (index, left_out) for one in selections for index, left_out in zip(one.indexes, one.without, strict=True)
        ]
        return cls([index for index, _ in parts], [left_out for _, left_out in parts])

    def __reduce__(self) -> tuple[type[Selection], tuple[list[Index], list[list[int]]]]:
        return Selection, (self.indexes, self.without)

    def __len__(self) -> int:
        return len(self.frames)

    def locate(self, clip: int) -> tuple[Index, int]:
        """The index of a clip and its number there."""
        which = int(np.searchsorted(self._starts, clip, side="right")) - 1
        return self.indexes[which], int(self._kept[which][clip - self._starts[which]])

    def id(self, clip: int) -> str:
        index, number = self.locate(clip)
        return index.id(number)

    def text(self, clip: int) -> str:
        index, number = self.locate(clip)
        return index.text(number)

    def language(self, clip: int) -> str:
        index, number = self.locate(clip)
        return index.language(number)

    def texts(self) -> list[str]:
        return [self.text(clip) for clip in range(len(self))]

    def languages(self) -> list[str]:
        """The languages that occur, each once, sorted."""
        return sorted({language for index in self.indexes for language in index.languages()})

    def prefetch(self, clips: Iterable[int]) -> None:
        """Have these clips' bytes near at hand when they are read."""
        numbers: dict[int, list[int]] = {}
        places = [self.locate(clip) for clip in clips]
        for index, number in places:
            numbers.setdefault(self.indexes.index(index), []).append(number)
        for which, own in numbers.items():
            self.indexes[which].prefetch(own)

    def parts(self, weights: Sequence[float], temperature: float) -> list[Part]:
        """How much of each index an epoch of n clips takes: shares by weight x size^(1 / temperature).

        Temperature 1 and equal weights take every clip once; a higher temperature takes more of the small corpora, as
        multilingual models do (Arivazhagan et al., arXiv 1907.05019, section 4.2). Each index gives at least one clip.
        """
        sizes = np.diff(self._starts)
        if (sizes == 0).any():
            empty = self.indexes[int(np.argmin(sizes))]
            raise InputError(f"{empty.path}: no clip of it is left; take it out of data.mix or restore its shards")
        wanted = np.array(weights) * sizes ** (1 / temperature)
        exact = wanted / wanted.sum() * len(self)
        quotas = np.maximum(1, exact.astype(np.int64))
        for part in np.argsort(quotas - exact, kind="stable")[: max(0, len(self) - int(quotas.sum()))]:
            quotas[part] += 1
        return [
            Part(np.arange(start, start + size), int(quota))
            for start, size, quota in zip(self._starts, sizes, quotas, strict=False)
        ]

    @property
    def digest(self) -> str:
        """The identity of these clips in this order: of a single whole index its own."""
        digests = [index.digest for index in self.indexes]
        if len(digests) == 1 and not self.without[0]:
            return digests[0]
        return hashlib.sha256(repr((digests, self.without)).encode()).hexdigest()

    @property
    def split(self) -> str:
        return self.indexes[0].split

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return " + ".join(f"{index.folder}, {index.split}" for index in self.indexes)
