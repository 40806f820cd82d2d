from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sltscale.config import DataSettings
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Part, Plan
from sltscale.data.corpora import read_corpus
from sltscale.errors import InputError

lengths_of_clips = st.lists(st.integers(1, 300), min_size=1, max_size=90)


@given(lengths_of_clips, st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 3))
def test_an_epoch_partitions_the_clips_into_even_batches(
    lengths: list[int], global_batch: int, seed: int, epoch: int
) -> None:
    plan = Plan(lengths, seed, BatchRule(clips=global_batch))
    steps = range(plan.steps(epoch), plan.steps(epoch + 1))
    batches = [plan.batch(step) for step in steps]
    assert {plan.epoch_of(step) for step in steps} == {epoch}
    assert len(batches) == -(-len(lengths) // global_batch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= global_batch
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == plan.smallest_batch(1)


@given(lengths_of_clips, st.integers(1, 40), st.integers(0, 100), st.integers(1, 4))
def test_ranks_share_each_global_batch_and_do_not_change_it(
    lengths: list[int], global_batch: int, seed: int, world_size: int
) -> None:
    plan, other = (Plan(lengths, seed, BatchRule(clips=global_batch)) for _ in range(2))
    if world_size > plan.smallest_batch(2):
        with pytest.raises(
            InputError, match=rf"{world_size} ranks.*{plan.smallest_batch(2)} clips.*data\.global_batch"
        ):
            plan.check_world_size(world_size, 2)
        return
    for step in range(plan.steps(2)):
        shares = [plan.share(step, rank, world_size) for rank in range(world_size)]
        assert all(len(share) for share in shares)
        assert sorted(np.concatenate(shares)) == sorted(other.batch(step))
        frames = [sum(lengths[clip] for clip in share) for share in shares]
        assert max(frames) - min(frames) <= max(lengths[clip] for clip in other.batch(step))


def test_the_order_is_fixed_for_all_time() -> None:
    # A run that is resumed under another numpy or sltscale must go on in the same order.
    plan = Plan([10] * 10, seed=3, rule=BatchRule(clips=4))
    first = [[4, 6, 1], [5, 7, 0], [3, 8, 9, 2]]
    second = [[9, 0, 6], [7, 5, 8], [2, 1, 4, 3]]
    assert [plan.batch(step).tolist() for step in range(6)] == first + second


def test_epochs_and_seeds_differ_and_lengths_do_not_matter() -> None:
    plan = Plan([5] * 50, seed=0, rule=BatchRule(clips=50))
    assert plan.batch(0).tolist() != plan.batch(1).tolist()
    assert plan.batch(0).tolist() != Plan([5] * 50, seed=1, rule=BatchRule(clips=50)).batch(0).tolist()
    assert plan.batch(0).tolist() == Plan(range(1, 51), seed=0, rule=BatchRule(clips=50)).batch(0).tolist()


def test_without_shuffling_every_epoch_is_in_the_order_of_the_clips() -> None:
    plan = Plan([5] * 10, 3, BatchRule(clips=4, shuffle=False))
    for epoch in range(2):
        steps = range(plan.steps(epoch), plan.steps(epoch + 1))
        assert np.concatenate([plan.batch(step) for step in steps]).tolist() == list(range(10))
    settings = {"shards": "x", "frame_size": 8, "crop_size": 8, "global_batch": 4, "shuffle": False}
    assert not BatchRule.of(DataSettings(**settings)).shuffle
    for more in ({"bucket_window": 64}, {"mix": [{"shards": "y"}]}):
        with pytest.raises(ValidationError, match="draw an order of their own"):
            DataSettings(**settings, **more)


def test_steps_may_be_asked_for_in_any_order() -> None:
    plan = Plan([5] * 30, seed=0, rule=BatchRule(clips=7))
    forward = [plan.batch(step).tolist() for step in range(20)]
    assert [plan.batch(step).tolist() for step in reversed(range(20))] == forward[::-1]


def test_padding_and_imbalance_by_hand() -> None:
    # One batch of all four clips. Two ranks: longest first to the lightest rank gives {4, 1} and {3, 2}: 5 frames each,
    # padded 2 x 4 and 2 x 3 = 14 for 10 frames. Three ranks: {4}, {3}, {2, 1}: 4 + 3 + 4 = 11, fullest 4 of 10 / 3.
    plan = Plan([1, 2, 3, 4], seed=0, rule=BatchRule(clips=4))
    two, three = plan.padding_and_imbalance(0, 2), plan.padding_and_imbalance(0, 3)
    assert (two.padding, two.imbalance) == pytest.approx((1 - 10 / 14, 0))
    assert (three.padding, three.imbalance) == pytest.approx((1 - 10 / 11, 0.2))


@pytest.mark.parametrize(
    ("lengths", "seed", "global_batch", "message"),
    [([], 0, 4, "no clips"), ([3], 0, 0, "global_batch is 0"), ([3], -1, 4, "seed is -1")],
)
def test_plans_that_cannot_be(lengths: list[int], seed: int, global_batch: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan(lengths, seed, BatchRule(clips=global_batch))


rules = st.builds(
    BatchRule,
    clips=st.none() | st.integers(1, 40),
    frames=st.integers(300, 3000),
    window=st.integers(1, 60),
    multiple=st.integers(1, 5),
)


@given(lengths_of_clips, rules, st.integers(0, 100), st.integers(0, 2))
def test_a_frame_budget_holds_for_every_batch_and_every_clip_comes_once(
    lengths: list[int], rule: BatchRule, seed: int, epoch: int
) -> None:
    plan = Plan(lengths, seed, rule)
    steps = range(plan.steps(epoch), plan.steps(epoch + 1))
    batches = [plan.batch(step) for step in steps]
    assert {plan.epoch_of(step) for step in steps} == {epoch}
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert rule.frames is not None
    for batch in batches:
        assert len(batch) * max(lengths[clip] for clip in batch) <= rule.frames
        assert rule.clips is None or len(batch) <= rule.clips
    assert min(map(len, batches)) >= plan.smallest_batch(epoch + 1)


@given(lengths_of_clips, st.integers(1, 40), st.integers(1, 90), st.integers(0, 100))
def test_a_window_changes_who_goes_together_but_not_how_many(
    lengths: list[int], clips: int, window: int, seed: int
) -> None:
    plan = Plan(lengths, seed, BatchRule(clips=clips, window=window))
    batches = [plan.batch(step) for step in range(plan.steps(1))]
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert len(batches) == -(-len(lengths) // clips)


def test_multiples_are_kept_where_the_budget_holds_so_many() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 3000)
    plan = Plan(lengths, 0, BatchRule(frames=4000, window=500, multiple=8))
    sizes = np.array([len(plan.batch(step)) for step in range(plan.steps(1))])
    assert (sizes % 8 > 0).sum() <= 7  # what is left over is spread over batches that have room
    assert sizes.min() >= 16


@given(lengths_of_clips, rules | st.builds(BatchRule, clips=st.integers(1, 40)), st.integers(0, 9), st.data())
def test_a_state_leads_back_to_its_step(lengths: list[int], rule: BatchRule, seed: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, Plan(lengths, seed, rule).steps(3)))
    state = Plan(lengths, seed, rule).state(step)
    assert set(state) == {"seed", "epoch", "clips"}
    assert Plan(lengths, seed, rule).step_at(state) == step
    with pytest.raises(InputError, match="not one of this plan's"):
        Plan(lengths, seed + 1, rule).step_at(state)


def test_a_state_of_another_batch_rule_is_refused() -> None:
    state = Plan([5] * 50, 0, BatchRule(clips=7)).state(2)
    with pytest.raises(InputError, match="not one of this plan's"):
        Plan([5] * 50, 0, BatchRule(clips=10)).step_at(state)


def test_a_mixture_takes_its_quotas_and_wears_every_clip_evenly() -> None:
    small, large = np.arange(10), np.arange(10, 100)
    plan = Plan([7] * 100, 3, BatchRule(clips=16), parts=[Part(small, 37), Part(large, 63)])
    taken = np.zeros(100, dtype=int)
    for epoch in range(10):
        clips = np.concatenate([plan.batch(step) for step in range(plan.steps(epoch), plan.steps(epoch + 1))])
        assert ((clips < 10).sum(), (clips >= 10).sum()) == (37, 63)
        taken += np.bincount(clips, minlength=100)
        assert np.ptp(taken[:10]) <= 1
        assert np.ptp(taken[10:]) <= 1
    again = Plan([7] * 100, 3, BatchRule(clips=16), parts=[Part(small, 37), Part(large, 63)])
    assert again.batch(40).tolist() == plan.batch(40).tolist()
    assert plan.batch(0).tolist() != sorted(plan.batch(0))


def test_real_lengths_waste_little_under_a_frame_budget() -> None:
    lengths = phoenix_lengths()
    plan = Plan(lengths, 0, BatchRule(frames=9600, window=4096, multiple=8))
    waste = plan.padding_and_imbalance(0, 8)
    assert waste.padding <= 0.03
    assert waste.imbalance <= 0.03
    shares = [lengths[share] for step in range(plan.steps(1)) for share in plan.shares(step, 8)]
    assert max(len(share) * int(share.max()) for share in shares) <= 9600 // 8
    assert Plan(lengths, 0, BatchRule(clips=83)).padding_and_imbalance(0, 8).padding > 0.3


def phoenix_lengths() -> np.ndarray:
    path = Path(__file__).parents[3] / "shared" / "annotations" / "phoenix2014t" / "labels.train"
    if not path.is_file():
        pytest.skip("PHOENIX-2014T's labels are not on this machine")
    corpus = read_corpus("phoenix2014t", [path], None)
    return np.array([len(clip.images) for clip in corpus.clips])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (BatchRule(), "no batch rule"),
        (BatchRule(frames=100, window=10), "global_frames is 100, but the longest clip has 300"),
    ],
)
def test_rules_that_cannot_be(rule: BatchRule, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan([20, 300], 0, rule)


def test_a_million_clips_are_planned_once_each() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 1_000_000, dtype=np.int32)
    for rule in (BatchRule(clips=1024), BatchRule(frames=9600, window=4096, multiple=8)):
        plan = Plan(lengths, 0, rule)
        batches = [plan.batch(step) for step in range(plan.steps(1))]
        assert np.bincount(np.concatenate(batches)).tolist() == [1] * len(lengths)


@given(
    lengths_of_clips, rules, st.integers(0, 9), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=9)
)
def test_an_epoch_is_dealt_once_each_though_the_ranks_change_under_way(
    lengths: list[int], rule: BatchRule, seed: int, changes: list[tuple[int, int]]
) -> None:
    """changes: (steps, ranks) between interruptions; each new start knows the saved state alone."""
    whole = Plan(lengths, seed, rule)
    state = whole.state(0)
    seen: list[int] = []
    for steps, ranks in [*changes, (whole.steps(1), 1)]:
        plan = Plan(lengths, seed, rule)
        begin = plan.step_at(state)
        end = min(begin + steps, plan.steps(1))
        for step in range(begin, end):
            dealt = np.concatenate(plan.shares(step, ranks)).tolist()
            assert sorted(dealt) == sorted(whole.batch(step).tolist())
            seen += dealt
        state = plan.state(end)
    assert sorted(seen) == list(range(len(lengths)))
