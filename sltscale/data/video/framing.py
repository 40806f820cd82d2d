"""Where in a stored frame the picture goes, and which part of the source's picture it is: crop box and aspect.

All in the upright source: a rotated video is turned first. Letters: H and W height and width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from sltscale.data.clips import Cutting
from sltscale.data.video.limits import VideoError


@dataclass(frozen=True)
class Framing:
    """box: (left, top, right, bottom) pixels of the source that are kept (None = all of it). width, height: what they
    are resized to; the rest of the size x size frame is black, in equal parts on both sides.
    """

    box: tuple[int, int, int, int] | None
    width: int
    height: int
    size: int

    def pad(self, rgb: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3] into the middle of a black [size, size, 3]."""
        if rgb.shape[:2] == (self.size, self.size):
            return rgb
        frame = np.zeros((self.size, self.size, 3), np.uint8)
        top, left = (self.size - self.height) // 2, (self.size - self.width) // 2
        frame[top : top + self.height, left : left + self.width] = rgb
        return frame


@functools.lru_cache(maxsize=16)
def framing(
    width: int, height: int, crop: tuple[int, int, int, int] | None, cutting: Cutting, pixel_aspect: Fraction
) -> Framing:
    """How pictures of width x height become stored frames.

    crop: the clip's own box (left, top, width, height). pixel_aspect: width of a pixel by its height; it counts where
    the aspect is kept. VideoError if the clip's box is empty or reaches outside the picture: it was made for another
    one, such as the same video in another size. The margin around it ends at the picture's edge.
    """
    size = cutting.frame_size
    box = _box(width, height, crop, cutting)
    if cutting.aspect == "squash":
        return Framing(box, size, size, size)
    left, top, right, bottom = box or (0, 0, width, height)
    wide, high = (right - left) * pixel_aspect, Fraction(bottom - top)
    scale = size / max(wide, high)
    return Framing(box, _even_border(size, wide * scale), _even_border(size, high * scale), size)


def _box(
    width: int, height: int, crop: tuple[int, int, int, int] | None, cutting: Cutting
) -> tuple[int, int, int, int] | None:
    if crop is not None:
        left, top, wide, high = crop
        if wide < 1 or high < 1 or left < 0 or top < 0 or left + wide > width or top + high > height:
            raise VideoError(
                f"crop box {left},{top},{wide},{high} is not inside the picture of {width}x{height} pixels"
            )
        more = _exact(cutting.margin)
        box = (
            max(0, math.floor(left - more * wide)),
            max(0, math.floor(top - more * high)),
            min(width, math.ceil(left + wide + more * wide)),
            min(height, math.ceil(top + high + more * high)),
        )
    elif cutting.crop is not None:
        shares = [_exact(share) for share in cutting.crop]
        box = (
            math.floor(shares[0] * width),
            math.floor(shares[1] * height),
            math.ceil(shares[2] * width),
            math.ceil(shares[3] * height),
        )
    else:
        return None
    return None if box == (0, 0, width, height) else box


def _exact(share: float) -> Fraction:
    """0.9 as 9/10, so that nine tenths of 100 pixels are not rounded up to 91."""
    return Fraction(share).limit_denominator(1_000_000)


def _even_border(size: int, length: Fraction) -> int:
    """The nearest length that leaves an even number of pixels on both sides, as chroma counts pixels in pairs."""
    border = round((size - length) / 4)
    return size - 4 * min(border, (size - 2) // 4)
