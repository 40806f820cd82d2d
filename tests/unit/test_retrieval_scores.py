"""Ranks and recalls against hand-computed tables; ties and repeated sentences included."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sltscale.errors import InputError
from sltscale.evaluation.retrieval import merge_duplicates, ranks, score, score_both


def test_table_by_hand() -> None:
    similarity = [
        [9, 1, 2, 3],  # right first: rank 1
        [5, 4, 3, 2],  # rank 2
        [5, 4, 1, 2],  # rank 4
        [1, 2, 3, 4],  # rank 1
    ]
    assert ranks(similarity).tolist() == [1, 2, 4, 1]
    found = score(similarity)
    assert found == {"recall@1": 50, "recall@5": 100, "recall@10": 100, "median_rank": 1.5, "mean_rank": 2}


def test_explicit_targets_and_more_candidates_than_queries() -> None:
    similarity = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    assert ranks(similarity, targets=[2, 0]).tolist() == [2, 1]
    assert ranks(similarity).tolist() == [3, 2]
    assert score(similarity, targets=np.array([2, 0]))["recall@1"] == 50


def test_ties_by_hand() -> None:
    # one better, two wrong ones equal to the right one: places 2, 3, 4 are equally likely
    found = score([[3, 7, 3, 3, 1, 0]], targets=[0])
    assert found["mean_rank"] == 3
    assert found["recall@1"] == 0
    assert score([[3, 3, 1]], targets=[1])["recall@1"] == pytest.approx(50)
    # seven equal, cutoff 5
    assert score(np.zeros((1, 7)), targets=[3])["recall@5"] == pytest.approx(100 * 5 / 7)


@pytest.mark.parametrize("candidates", [1, 2, 9, 10, 40])
def test_constant_similarity_scores_chance(candidates: int) -> None:
    found = score(np.full((candidates, candidates), 0.5, dtype=np.float32))
    for k in (1, 5, 10):
        assert found[f"recall@{k}"] == pytest.approx(100 * min(k / candidates, 1))
    assert found["median_rank"] == found["mean_rank"] == (candidates + 1) / 2


def test_several_right_candidates_count_by_the_best() -> None:
    similarity = [[5, 4, 3, 2, 1], [5, 4, 3, 2, 1]]
    assert ranks(similarity, targets=[{1, 4}, {3, 4}]).tolist() == [2, 4]
    # two right and two wrong ones equal: the first right one stands at 1 (1/2), 2 (1/3) or 3 (1/6)
    tied = score([[1, 1, 1, 1]], targets=[{0, 2}])
    assert tied["mean_rank"] == pytest.approx(1 / 2 + 2 / 3 + 3 / 6)
    assert tied["recall@1"] == pytest.approx(50)


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    right=st.sets(st.integers(0, 5), min_size=1, max_size=3),
)
def test_ties_are_the_mean_over_all_orders(row: list[int], right: set[int]) -> None:
    right = {i % len(row) for i in right}
    firsts = [
        1 + min(place for place, candidate in enumerate(order) if candidate in right)
        for order in itertools.permutations(range(len(row)))
        if all(row[a] >= row[b] for a, b in itertools.pairwise(order))
    ]
    found = score([row], targets=[right])
    assert found["mean_rank"] == pytest.approx(sum(firsts) / len(firsts))
    for k in (1, 5):
        assert found[f"recall@{k}"] == pytest.approx(100 * sum(first <= k for first in firsts) / len(firsts))


def test_both_directions_by_hand() -> None:
    # rows: videos, columns: their sentences
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4], [0.1, 0.85, 0.7]])
    found = score_both(similarity, ["a", "b", "c"])
    # video 0 finds a first; video 1 finds b second; video 2 finds c second
    assert found["v2t_recall@1"] == pytest.approx(100 / 3)
    assert found["v2t_mean_rank"] == pytest.approx(5 / 3)
    # sentence a finds video 0 first; b finds video 1 last; c finds video 2 first
    assert found["t2v_recall@1"] == pytest.approx(200 / 3)
    assert found["t2v_mean_rank"] == pytest.approx(5 / 3)
    assert found["t2v_median_rank"] == 1
    assert len(found) == 10


def test_identical_sentences_are_one_text() -> None:
    # clips 0 and 2 say the same, clip 1 something else; columns 0 and 2 are the same sentence
    similarity = np.array([[0.1, 0.5, 0.1], [0.4, 0.2, 0.4], [0.9, 0.6, 0.9]])
    texts = ["guten abend", "regen", "guten  abend"]
    items = merge_duplicates(similarity, texts)
    assert items.text_of_clip.tolist() == [0, 1, 0]
    assert items.clip_of_text.tolist() == [0, 1]
    assert items.video_to_text.tolist() == [[0.1, 0.5], [0.4, 0.2], [0.9, 0.6]]
    assert items.text_to_video.tolist() == [[0.9, 0.4], [0.6, 0.2]]
    found = score_both(similarity, texts)
    # text to video, two sentences: the first has its best video (0.9) before 0.4; the second 0.2 after 0.6
    assert found["t2v_recall@1"] == 50
    assert found["t2v_mean_rank"] == 1.5  # the two better videos of "guten abend" count once
    # video to text, three videos, two texts: 0.1 < 0.5 wrong, 0.2 < 0.4 wrong, 0.9 > 0.6 right
    assert found["v2t_recall@1"] == pytest.approx(100 / 3)


def test_duplicates_do_not_make_a_perfect_model_imperfect() -> None:
    texts = ["a", "b", "a", "c", "b", "a"]
    similarity = np.array([[float(x == y) for y in texts] for x in texts])
    found = score_both(similarity, texts)
    assert found["t2v_recall@1"] == found["v2t_recall@1"] == 100


def test_takes_tensors_of_any_precision() -> None:
    similarity = torch.tensor([[1.0, 0.0], [0.5, 0.25]], dtype=torch.bfloat16, requires_grad=True)
    assert ranks(similarity).tolist() == [1, 2]
    # a difference that only float64 shows
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert ranks(close, targets=[1]).tolist() == [1]


def test_infinite_similarity_is_a_similarity() -> None:
    assert ranks([[-math.inf, 1.0], [2.0, math.inf]]).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("similarity", "targets", "message"),
    [
        ([[math.nan, 1.0]], [0], "1 of 2 similarities are NaN"),
        (np.zeros((0, 3)), None, "neither empty"),
        (np.zeros(3), None, r"shape \[3\]"),
        (np.zeros((3, 2)), None, "3 queries but 2 candidates"),
        (np.zeros((2, 2)), [0], "1 targets for 2 queries"),
        (np.zeros((1, 2)), [2], r"targets \[2\] of query 0"),
        (np.zeros((1, 2)), [-1], r"targets \[-1\] of query 0"),
        (np.zeros((2, 2)), [{0}, set()], r"targets \[\] of query 1"),
    ],
)
def test_bad_input_is_refused(similarity: object, targets: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(similarity, targets=targets)  # type: ignore[arg-type]


def test_texts_must_fit_the_matrix() -> None:
    with pytest.raises(InputError, match="2 x 2; expected one row and column per text, 3"):
        score_both(np.zeros((2, 2)), ["a", "b", "c"])
