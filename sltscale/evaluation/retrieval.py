"""Ranks and recall of sentences retrieved by videos and videos by sentences.

Letters: Q queries, C candidates, V videos (clips), U different sentences.

Ties are counted as a coin would settle them: among candidates of equal similarity every order is equally likely, and
ranks and recalls are the expectations over those orders. A model that gives all C candidates the same similarity gets
recall@k = 100 k / C, not 100.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sltscale.errors import InputError

CUTOFFS = (1, 5, 10)
Targets = Sequence[int] | Sequence[Collection[int]] | npt.NDArray[np.integer[Any]]
Matrix = npt.NDArray[np.floating[Any]]


def score(similarity: npt.ArrayLike | torch.Tensor, *, targets: Targets | None = None) -> dict[str, float]:
    """Retrieval scores of ``similarity`` [Q, C], greater = more alike.

    targets: per query the right candidate's column, or the several right ones (the best-ranked counts); by default
    query i belongs to candidate i.

    Returns ``recall@1``, ``recall@5``, ``recall@10`` (percent), ``median_rank`` and ``mean_rank`` (1 = best).
    Raises InputError for an empty matrix, NaN (which would rank first everywhere) and impossible targets.
    """
    places = _places(_matrix(similarity), targets)
    expected = np.array([place.rank for place in places])
    scores = {f"recall@{k}": 100 * math.fsum(place.within(k) for place in places) / len(places) for k in CUTOFFS}
    return scores | {"median_rank": float(np.median(expected)), "mean_rank": float(np.mean(expected))}


def ranks(similarity: npt.ArrayLike | torch.Tensor, *, targets: Targets | None = None) -> npt.NDArray[np.float64]:
    """Expected rank [Q] (1 = best) of each query's right candidate; arguments as in ``score``."""
    return np.array([place.rank for place in _places(_matrix(similarity), targets)])


@dataclass(frozen=True)
class Items:
    """A square similarity with identical sentences merged to one text item.

    text_of_clip [V] and clip_of_text [U] (its first clip) lead from the one to the other;
    video_to_text [V, U]; text_to_video [U, U], where a column stands for all videos of that sentence.
    """

    text_of_clip: npt.NDArray[np.int64]
    clip_of_text: npt.NDArray[np.int64]
    video_to_text: Matrix
    text_to_video: Matrix


def merge_duplicates(similarity: npt.ArrayLike | torch.Tensor, texts: Sequence[str]) -> Items:
    """Group the clips of ``similarity`` [V, V] (row = video, column = sentence of clip) by their sentence.

    CiCo's rule for corpora that repeat sentences (methods of CSL-Daily): video to text is per video; in text to video
    the videos of one sentence count as one candidate with their greatest similarity.
    """
    matrix = _matrix(similarity)
    if matrix.shape != (len(texts), len(texts)):
        raise InputError(
            f"similarity is {matrix.shape[0]} x {matrix.shape[1]}; expected one row and column per text, {len(texts)}"
        )
    number: dict[str, int] = {}
    text_of_clip = np.array([number.setdefault(" ".join(text.split()), len(number)) for text in texts])
    _, clip_of_text = np.unique(text_of_clip, return_index=True)
    video_to_text = matrix[:, clip_of_text]
    order = np.argsort(text_of_clip, kind="stable")
    starts = np.searchsorted(text_of_clip[order], np.arange(len(number)))
    best_video = np.maximum.reduceat(video_to_text[order], starts, axis=0)
    return Items(text_of_clip, clip_of_text, video_to_text, np.ascontiguousarray(best_video.T))


def score_both(similarity: npt.ArrayLike | torch.Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Both directions of ``similarity`` [videos, sentences]; row i and column i belong to one clip with ``texts[i]``.

    Returns the keys of ``score`` prefixed ``t2v_`` and ``v2t_``; identical sentences are grouped (merge_duplicates).
    """
    items = merge_duplicates(similarity, texts)
    t2v = score(items.text_to_video)
    v2t = score(items.video_to_text, targets=items.text_of_clip)
    return {f"t2v_{key}": value for key, value in t2v.items()} | {f"v2t_{key}": value for key, value in v2t.items()}


@dataclass(frozen=True)
class _Place:
    """Where a query's best right candidate stands: ``better`` wrong ones before it, ``equal`` wrong ones beside it.

    right: how many right candidates share the best similarity.
    """

    better: int
    equal: int
    right: int

    @property
    def rank(self) -> float:
        """Expected place of the first right one, if the equal ones stand in random order."""
        return self.better + (self.equal + self.right + 1) / (self.right + 1)

    def within(self, k: int) -> float:
        """Probability that a right one is among the first ``k``."""
        open_places = min(max(k - self.better, 0), self.equal + self.right)
        all_wrong = math.comb(self.equal, open_places) / math.comb(self.equal + self.right, open_places)
        return 1.0 - all_wrong


def _places(similarity: Matrix, targets: Targets | None) -> list[_Place]:
    queries, candidates = similarity.shape
    if targets is None:
        if queries > candidates:
            raise InputError(f"{queries} queries but {candidates} candidates; say which candidate is right (targets)")
        targets = range(queries)
    if len(targets) != queries:
        raise InputError(f"{len(targets)} targets for {queries} queries; expected one each")
    return [_place(row, right, query) for query, (row, right) in enumerate(zip(similarity, targets, strict=True))]


def _place(row: Matrix, right: int | Collection[int], query: int) -> _Place:
    columns = sorted({int(i) for i in right}) if isinstance(right, Collection) else [int(right)]
    if not columns or columns[0] < 0 or columns[-1] >= len(row):
        raise InputError(f"targets {columns} of query {query}; expected at least one, all from 0 to {len(row) - 1}")
    best = row[columns].max()
    equal_right = int((row[columns] == best).sum())
    return _Place(better=int((row > best).sum()), equal=int((row == best).sum()) - equal_right, right=equal_right)


def _matrix(similarity: npt.ArrayLike | torch.Tensor) -> Matrix:
    if isinstance(similarity, torch.Tensor):
        similarity = similarity.detach().cpu()
        similarity = (similarity if similarity.dtype == torch.float64 else similarity.float()).numpy()
    matrix = np.asarray(similarity)
    if matrix.ndim != 2 or not matrix.size:
        raise InputError(f"similarity of shape {list(matrix.shape)}; expected [queries, candidates], neither empty")
    matrix = matrix if np.issubdtype(matrix.dtype, np.floating) else matrix.astype(np.float64)
    missing = int(np.isnan(matrix).sum())
    if missing:
        raise InputError(f"{missing} of {matrix.size} similarities are NaN; expected numbers, the model has diverged")
    return matrix
