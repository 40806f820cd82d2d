import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltscale.data.plan import Plan, evaluation_shares
from sltscale.errors import InputError

lengths_of_clips = st.lists(st.integers(1, 300), min_size=1, max_size=90)


@given(lengths_of_clips, st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_partitions_the_clips_into_even_batches(
    lengths: list[int], global_batch: int, seed: int, epoch: int
) -> None:
    plan = Plan(lengths, seed, global_batch)
    steps = range(plan.steps(epoch), plan.steps(epoch + 1))
    batches = [plan.batch(step) for step in steps]
    assert {plan.epoch_of(step) for step in steps} == {epoch}
    assert len(batches) == -(-len(lengths) // global_batch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= global_batch
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == plan.smallest_batch


@given(lengths_of_clips, st.integers(1, 40), st.integers(0, 100), st.integers(1, 4))
def test_ranks_share_each_global_batch_and_do_not_change_it(
    lengths: list[int], global_batch: int, seed: int, world_size: int
) -> None:
    plan, other = Plan(lengths, seed, global_batch), Plan(lengths, seed, global_batch)
    if world_size > plan.smallest_batch:
        with pytest.raises(InputError, match=rf"{world_size} ranks.*{plan.smallest_batch} clips.*data\.global_batch"):
            plan.share(0, 0, world_size)
        return
    for step in range(plan.steps(2)):
        shares = [plan.share(step, rank, world_size) for rank in range(world_size)]
        assert all(len(share) for share in shares)
        assert sorted(np.concatenate(shares)) == sorted(other.batch(step))
        frames = [sum(lengths[clip] for clip in share) for share in shares]
        assert max(frames) - min(frames) <= max(lengths[clip] for clip in other.batch(step))


def test_the_order_is_fixed_for_all_time() -> None:
    # A run that is resumed under another numpy or sltscale must go on in the same order.
    plan = Plan([10] * 10, seed=3, global_batch=4)
    first = [[4, 6, 1], [5, 7, 0], [3, 8, 9, 2]]
    second = [[9, 0, 6], [7, 5, 8], [2, 1, 4, 3]]
    assert [plan.batch(step).tolist() for step in range(6)] == first + second


def test_epochs_and_seeds_differ_and_lengths_do_not_matter() -> None:
    plan = Plan([5] * 50, seed=0, global_batch=50)
    assert plan.batch(0).tolist() != plan.batch(1).tolist()
    assert plan.batch(0).tolist() != Plan([5] * 50, seed=1, global_batch=50).batch(0).tolist()
    assert plan.batch(0).tolist() == Plan(range(1, 51), seed=0, global_batch=50).batch(0).tolist()


def test_steps_may_be_asked_for_in_any_order() -> None:
    plan = Plan([5] * 30, seed=0, global_batch=7)
    forward = [plan.batch(step).tolist() for step in range(20)]
    assert [plan.batch(step).tolist() for step in reversed(range(20))] == forward[::-1]


def test_padding_and_imbalance_by_hand() -> None:
    # One batch of all four clips. Two ranks: longest first to the lightest rank gives {4, 1} and {3, 2}: 5 frames each,
    # padded 2 x 4 and 2 x 3 = 14 for 10 frames. Three ranks: {4}, {3}, {2, 1}: 4 + 3 + 4 = 11, fullest 4 of 10 / 3.
    plan = Plan([1, 2, 3, 4], seed=0, global_batch=4)
    two, three = plan.padding_and_imbalance(0, 2), plan.padding_and_imbalance(0, 3)
    assert (two.padding, two.imbalance) == pytest.approx((1 - 10 / 14, 0))
    assert (three.padding, three.imbalance) == pytest.approx((1 - 10 / 11, 0.2))


@pytest.mark.parametrize(
    ("lengths", "seed", "global_batch", "message"),
    [([], 0, 4, "no clips"), ([3], 0, 0, "global_batch is 0"), ([3], -1, 4, "seed is -1")],
)
def test_plans_that_cannot_be(lengths: list[int], seed: int, global_batch: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan(lengths, seed, global_batch)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 9), st.integers(1, 20))
def test_evaluation_deals_every_clip_once_to_any_number_of_ranks(
    lengths: list[int], world_size: int, batch: int
) -> None:
    ranks = evaluation_shares(lengths, world_size, batch)
    assert len(ranks) == world_size
    batches = [clips for rank in ranks for clips in rank]
    assert all(0 < len(clips) <= batch for clips in batches)
    assert sorted(clip for clips in batches for clip in clips) == list(range(len(lengths)))
    for rank in ranks:
        ordered = [lengths[clip] for clips in rank for clip in clips]
        assert ordered == sorted(ordered, reverse=True)
    sizes = [sum(map(len, rank)) for rank in ranks]
    assert max(sizes) - min(sizes) <= 1


def test_a_million_clips_are_planned_once_each() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 1_000_000, dtype=np.int32)
    plan = Plan(lengths, seed=0, global_batch=1024)
    batches = [plan.batch(step) for step in range(plan.batches_per_epoch)]
    assert np.bincount(np.concatenate(batches)).tolist() == [1] * len(lengths)
