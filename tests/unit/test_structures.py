import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sltscale.structures import Ragged, VideoBatch

lengths_of_sequences = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def sequences(lengths: list[int], width: int = 3) -> list[torch.Tensor]:
    return [torch.randn(length, width) for length in lengths]


@given(lengths_of_sequences)
def test_packing_keeps_the_sequences_and_its_invariants(lengths: list[int]) -> None:
    parts = sequences(lengths)
    ragged = Ragged.from_list(parts)
    assert ragged.cu_seqlens.dtype == torch.int32
    assert ragged.cu_seqlens[0] == 0
    assert ragged.cu_seqlens[-1] == len(ragged.values) == sum(lengths)
    assert ragged.lengths.tolist() == lengths
    assert (len(ragged), ragged.max_seqlen) == (len(lengths), max(lengths))
    assert all(torch.equal(a, b) for a, b in zip(ragged.split(), parts, strict=True))


@given(lengths_of_sequences, st.floats(-5, 5))
def test_padding_and_back_is_the_identity(lengths: list[int], fill: float) -> None:
    ragged = Ragged.from_list(sequences(lengths))
    padded, mask = ragged.to_padded(fill)
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert mask.sum(1).tolist() == lengths
    assert torch.equal(padded[~mask], torch.full_like(padded[~mask], fill))
    for row, part, length in zip(padded, ragged.split(), lengths, strict=True):
        assert torch.equal(row[:length], part)
    assert torch.equal(Ragged.from_padded(padded, mask, ragged).values, ragged.values)


def test_frames_and_bare_steps_are_padded_too() -> None:
    frames = Ragged.from_lengths(torch.arange(3 * 3 * 2 * 2, dtype=torch.uint8).view(3, 3, 2, 2), [1, 2])
    padded, _ = frames.to_padded(7)
    assert padded.shape == (2, 2, 3, 2, 2)
    assert torch.equal(padded[1], frames.values[1:])
    assert (padded[0, 1] == 7).all()
    steps = Ragged.from_lengths(torch.tensor([1, 2, 3]), [2, 1])
    assert steps.to_padded()[0].tolist() == [[1, 2], [3, 0]]


def test_padding_carries_gradients_to_the_packed_steps() -> None:
    values = torch.randn(5, 2, requires_grad=True)
    weight = torch.randn(2, 3, 2)
    padded, mask = Ragged.from_lengths(values, [3, 2]).to_padded()
    (padded * weight).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weight[mask])


@pytest.mark.parametrize("lengths", [[1, 1], [2, 2], [4, -1]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not add up to the 3"):
        Ragged.from_lengths(torch.zeros(3, 1), lengths)


def test_other_values_must_have_as_many_steps() -> None:
    ragged = Ragged.from_lengths(torch.zeros(3, 1), [1, 2])
    assert ragged.with_values(torch.ones(3, 4)).lengths.tolist() == [1, 2]
    with pytest.raises(ValueError, match="expected 3 packed steps, found 2"):
        ragged.with_values(torch.ones(2, 4))


def test_a_batch_in_parts_is_the_batch() -> None:
    frames = Ragged.from_lengths(torch.arange(10).view(10, 1, 1), [3, 1, 4, 2])
    batch = VideoBatch(list("abcd"), frames, list("ABCD"), ["de"] * 4)
    parts = batch.split([1, 2, 1])
    assert [part.ids for part in parts] == [["a"], ["b", "c"], ["d"]]
    assert [part.texts for part in parts] == [["A"], ["B", "C"], ["D"]]
    assert [part.frames.lengths.tolist() for part in parts] == [[3], [1, 4], [2]]
    assert torch.equal(torch.cat([part.frames.values for part in parts]), frames.values)
