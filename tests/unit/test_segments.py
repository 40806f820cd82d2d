import gc

import torch

from sltscale.data.batches.segments import HEADER, Segments, borrow, payload


def fill(segments: Segments, size: int, value: int) -> torch.Tensor:
    segment = segments.take(size)
    payload(segment, size).fill_(value)
    return segment


def test_a_segment_is_used_again_when_nobody_looks_at_it() -> None:
    segments = Segments()
    first = borrow(fill(segments, 1000, 1), 1000)
    second = borrow(fill(segments, 1000, 2), 1000)
    assert first.tolist() == [1] * 1000, "a held segment must not be overwritten"
    assert second.tolist() == [2] * 1000
    place = second.data_ptr()
    del second
    assert borrow(fill(segments, 900, 3), 900).data_ptr() == place


def test_a_view_keeps_its_segment() -> None:
    segments = Segments()
    view = borrow(fill(segments, 64, 5), 64).view(8, 8)[2:4]
    gc.collect()
    others = [borrow(fill(segments, 64, 9), 64) for _ in range(3)]
    assert view.tolist() == [[5] * 8] * 2
    assert len({other.data_ptr() for other in others}) == 3


def test_segments_that_are_too_small_are_let_go() -> None:
    segments = Segments()
    for size in (100, 1000, 10_000):
        segment = segments.take(size)
        assert len(segment) >= HEADER + size
        borrow(segment, size)
    assert len(segments._segments) == 1
