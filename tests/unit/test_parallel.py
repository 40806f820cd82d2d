import torch

from sltscale.parallel import gather, gather_objects, rank, sum_over_ranks, world_size


def test_one_process_is_its_own_world() -> None:
    tensor, mask = torch.randn(2, 3, 4, requires_grad=True), torch.ones(2, 3, dtype=torch.bool)
    gathered, gathered_mask, own = gather(tensor, mask)
    assert own == slice(0, 2)
    assert torch.equal(gathered, tensor)
    assert torch.equal(gathered_mask, mask)
    (gathered * 2).sum().backward()
    assert tensor.grad is not None
    assert (tensor.grad == 2).all()
    assert torch.equal(sum_over_ranks(tensor), tensor)
    assert gather_objects({"a": 1}) == [{"a": 1}]
    assert (rank(), world_size()) == (0, 1)
