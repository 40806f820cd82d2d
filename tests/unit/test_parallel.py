import torch
from hypothesis import given
from hypothesis import strategies as st

from sltscale.parallel import balanced_shares, gather, gather_objects, rank, sum_over_ranks, world_size

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


def test_one_process_is_its_own_world() -> None:
    tensor, mask = torch.randn(2, 3, 4, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    gathered, gathered_mask = gather(tensor, mask)
    assert torch.equal(gathered, tensor)
    assert torch.equal(gathered_mask, mask)
    (gathered * 2).sum().backward()
    assert tensor.grad is not None
    assert (tensor.grad == 2).all()
    assert torch.equal(sum_over_ranks(tensor), tensor)
    assert gather_objects({"a": 1}) == [{"a": 1}]
    assert (rank(), world_size()) == (0, 1)
