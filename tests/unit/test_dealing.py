from hypothesis import given
from hypothesis import strategies as st

from sltscale.data.batches.dealing import balanced_shares, evaluation_shares, micro_shares

loads = st.lists(st.integers(0, 500), max_size=60)


@given(loads, st.integers(1, 8))
def test_shares_partition_the_items_in_order(lengths: list[int], ranks: int) -> None:
    shares = balanced_shares(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(position for share in shares for position in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    assert shares == balanced_shares(lengths, ranks)


@given(loads, st.integers(1, 8))
def test_no_rank_is_empty_while_there_are_enough_items(lengths: list[int], ranks: int) -> None:
    shares = balanced_shares(lengths, ranks)
    assert sum(bool(share) for share in shares) == min(ranks, len(lengths))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), st.integers(1, 8))
def test_shares_are_close(lengths: list[int], ranks: int) -> None:
    # Longest first to the lightest rank: no two ranks differ by more than the longest item, and the fullest stays
    # within 4/3 of the best possible (Graham 1969), which the mean and the longest item bound from below.
    sums = [sum(lengths[position] for position in share) for share in balanced_shares(lengths, ranks)]
    assert max(sums) - min(sums) <= max(lengths)
    assert max(sums) <= sum(lengths) / ranks + max(lengths)


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


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 6), st.integers(200, 900))
def test_micro_batches_keep_to_the_budget_and_are_as_many_on_every_rank(
    lengths: list[int], ranks: int, budget: int
) -> None:
    if ranks > len(lengths):
        return
    dealt = micro_shares(lengths, ranks, budget)
    assert len(dealt) == ranks
    assert len({len(parts) for parts in dealt}) == 1
    assert all(0 < sum(lengths[position] for position in part) <= budget for parts in dealt for part in parts)
    assert sorted(position for parts in dealt for part in parts for position in part) == list(range(len(lengths)))
    if len(dealt[0]) == 1:
        assert max(sum(lengths[p] for p in parts[0]) for parts in dealt) <= budget


def test_without_a_budget_a_share_is_one_micro_batch() -> None:
    lengths = [5, 3, 8, 1]
    assert [parts[0] for parts in micro_shares(lengths, 2, None)] == balanced_shares(lengths, 2)
    assert len(micro_shares([10] * 12, 2, 30)[0]) == 2
