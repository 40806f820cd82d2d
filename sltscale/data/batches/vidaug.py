"""Training's changes of a clip's pictures, one draw for all its frames, as GFSLT-VLP and HFA make them with vidaug.

Source: zhoubenjia/GFSLT-VLP@91ba953 (datasets.py, augmentation.py) and okankop/vidaug@1c1ddf2: each with probability
1/2, and in this order, the picture is turned by up to 30 degrees, resized by 0.8 to 1.2, and moved by up to 10 pixels;
what was outside is black. That happens to the original picture, which is squashed to the square of the shards
afterwards, so that a turn is one of the original's proportions, and of the resizing only the size of the pixels that it
is moved by is left (and some blur, which is not reproduced). Here one map takes each pixel of the window from the
stored frame, the nearest one, luma and colour each on their own grid.

Letters: F frame size as stored, C size of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sltscale.config import Augment

DEGREES, RESIZE, PIXELS = 30.0, 0.2, 10
LEAST_COLOUR, MOST_COLOUR = 0.1, 1.5


@dataclass(frozen=True)
class Change:
    """angle: degrees, counter-clockwise. scale: of the resizing. shift: pixels of the resized picture by which its
    content goes left and up. brightness, saturation: factors of all colours and of their distance from grey."""

    angle: float = 0.0
    scale: float = 1.0
    shift: tuple[int, int] = (0, 0)
    brightness: float = 1.0
    saturation: float = 1.0

    @property
    def moves(self) -> bool:
        return bool(self.angle or any(self.shift))

    @property
    def recolours(self) -> bool:
        return (self.brightness, self.saturation) != (1.0, 1.0)


def draw_change(augment: Augment, rng: np.random.Generator) -> Change:
    """For "strong" the geometry; for "strong_color" a third of the clips stays as it is, a third gets geometry or
    colours, a third both; otherwise nothing changes."""
    change = Change()
    for part in _parts(augment, rng):
        change = part(change, rng)
    return change


def pixel_map(
    change: Change, size: int, crop: int, corner: tuple[int, int], resolution: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Where the pixels of a window come from: [3 C^2 / 2], places as ``stored.decode_pixels`` takes them.

    size: F. corner: (top, left) of the C x C window, even. resolution: width and height of the original picture, which
    fills the stored frame; (0, 0) if it is not known and taken to be square.
    """
    black = size * size * 3 // 2
    rows, columns, inside = _sources(change, size, crop, corner, resolution, 1)
    luma = np.where(inside, rows * size + columns, black)
    rows, columns, inside = _sources(change, size, crop, corner, resolution, 2)
    half = size // 2
    u = np.where(inside, size * size + rows * half + columns, black + 1)
    v = np.where(inside, u + half * half, black + 1)
    return np.concatenate([luma, u, v], axis=None)


def change_colours(frames: npt.NDArray[np.uint8], change: Change) -> None:
    """Brightness, then saturation, of frames [T, 3 C / 2, C] (YUV 4:2:0), in place.

    What Pillow's ImageEnhance does to RGB, but for colours that leave the range in between: black is Y = 16, and grey,
    Pillow's too, is the luma of ITU-R BT.601.
    """
    values = np.arange(256)
    luma = _table(16 + (values - 16) * change.brightness)
    colour = _table(128 + (values - 128) * change.brightness * change.saturation)
    pixels = frames.shape[1] * 2 // 3 * frames.shape[2]
    for frame in frames.reshape(len(frames), -1):
        for part, table in ((frame[:pixels], luma), (frame[pixels:], colour)):
            part[:] = np.frombuffer(part.tobytes().translate(table), np.uint8)


def _parts(augment: Augment, rng: np.random.Generator) -> Sequence[Callable[[Change, np.random.Generator], Change]]:
    both = (_geometry, _colours)
    if augment == "strong":
        return both[:1]
    if augment == "strong_color" and (number := rng.integers(3)):
        return both if number == 2 else (both[rng.integers(2)],)
    return ()


def _geometry(change: Change, rng: np.random.Generator) -> Change:
    angle = rng.uniform(-DEGREES, DEGREES) if rng.random() < 0.5 else 0.0
    scale = rng.uniform(1 - RESIZE, 1 + RESIZE) if rng.random() < 0.5 else 1.0
    x, y = rng.integers(-PIXELS, PIXELS + 1, 2).tolist() if rng.random() < 0.5 else (0, 0)
    return replace(change, angle=angle, scale=scale, shift=(x, y))


def _colours(change: Change, rng: np.random.Generator) -> Change:
    factors = [rng.uniform(LEAST_COLOUR, MOST_COLOUR) if rng.random() < 0.5 else 1.0 for _ in range(2)]
    return replace(change, brightness=factors[0], saturation=factors[1])


def _sources(
    change: Change, size: int, crop: int, corner: tuple[int, int], resolution: tuple[int, int], step: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Row and column in the stored plane, and whether there is one, for each pixel [C / step, C / step] of the
    window's plane whose pixels are step x step (1: luma, 2: colour)."""
    width, height = resolution if all(resolution) else (size, size)
    # Centres of the pixels in the finished frame, then, in pixels of the stored frame, in the turned picture.
    x = corner[1] + (np.arange(crop // step) + 0.5) * step + change.shift[0] * size / int(width * change.scale)
    y = corner[0] + (np.arange(crop // step) + 0.5) * step + change.shift[1] * size / int(height * change.scale)
    y = y[:, None]
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    # Around the middle, in pixels of the original.
    across, down = (x / size - 0.5) * width, (y / size - 0.5) * height
    cos, sin = np.cos(np.radians(change.angle)), np.sin(np.radians(change.angle))
    columns = np.floor(((across * cos - down * sin) / width + 0.5) * (size / step)).astype(np.int64)
    rows = np.floor(((across * sin + down * cos) / height + 0.5) * (size / step)).astype(np.int64)
    inside = inside & (columns >= 0) & (columns < size // step) & (rows >= 0) & (rows < size // step)
    return rows, columns, inside


def _table(values: npt.NDArray[np.floating]) -> bytes:
    return np.rint(values).clip(0, 255).astype(np.uint8).tobytes()
