"""Crop boxes and aspect, as numbers worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltscale.data.clips import Cutting
from sltscale.data.video.framing import Framing, framing
from sltscale.data.video.limits import VideoError

SQUARE = Fraction(1)


def test_boxes() -> None:
    for crop, settings, box in [
        (None, {}, None),
        ((10, 20, 40, 30), {}, (10, 20, 50, 50)),
        ((10, 20, 40, 30), {"margin": 0.1}, (6, 17, 54, 53)),
        ((10, 20, 40, 30), {"margin": 0.5}, (0, 5, 70, 65)),
        ((0, 0, 200, 100), {}, None),
        ((50, 50, 100, 40), {"margin": 1}, (0, 10, 200, 100)),
        (None, {"crop": (0.1, 0.3, 0.9, 0.7)}, (20, 30, 180, 70)),
        (None, {"crop": (0.333, 0.333, 0.667, 0.667)}, (66, 33, 134, 67)),
        (None, {"crop": (0.1, 0.3, 0.9, 0.7), "margin": 0.5}, (20, 30, 180, 70)),
        ((1, 2, 3, 4), {"crop": (0.1, 0.3, 0.9, 0.7)}, (1, 2, 4, 6)),
    ]:
        assert framing(200, 100, crop, Cutting(64, **settings), SQUARE) == Framing(box, 64, 64, 64)


def test_a_box_for_another_picture_is_refused() -> None:
    for crop in [(-1, 0, 10, 10), (0, -1, 10, 10), (191, 0, 10, 10), (0, 91, 10, 10), (5, 5, 0, 10), (5, 5, 10, -1)]:
        with pytest.raises(VideoError, match="is not inside the picture of 200x100 pixels"):
            framing(200, 100, crop, Cutting(64, margin=0.5), SQUARE)


def test_kept_aspect() -> None:
    for width, height, pixel, size, expected in [
        (200, 100, SQUARE, 64, (64, 32)),
        (100, 200, SQUARE, 64, (32, 64)),
        (100, 100, SQUARE, 64, (64, 64)),
        (1920, 1080, SQUARE, 256, (256, 144)),
        (540, 720, SQUARE, 256, (192, 256)),
        (720, 576, Fraction(16, 15), 256, (256, 192)),
        (720, 576, Fraction(64, 45), 256, (256, 144)),
        (4000, 1, SQUARE, 64, (64, 4)),
        (4000, 1, SQUARE, 66, (66, 2)),
    ]:
        found = framing(width, height, None, Cutting(size, aspect="keep"), pixel)
        assert (found.width, found.height) == expected


@given(
    width=st.integers(1, 4096),
    height=st.integers(1, 4096),
    size=st.integers(8, 300).map(lambda half: 2 * half),
    pixel=st.fractions(Fraction(1, 4), 4, max_denominator=64),
)
def test_pictures_are_centred_on_even_pixels(width: int, height: int, size: int, pixel: Fraction) -> None:
    found = framing(width, height, None, Cutting(size, aspect="keep"), pixel)
    for length in (found.width, found.height):
        assert 2 <= length <= size and length % 2 == 0 and (size - length) % 4 == 0
    assert size in (found.width, found.height)
    frame = found.pad(np.full((found.height, found.width, 3), 255, np.uint8))
    rows, columns = frame.any(axis=(1, 2)), frame.any(axis=(0, 2))
    assert frame.shape == (size, size, 3) and (rows == rows[::-1]).all() and (columns == columns[::-1]).all()
