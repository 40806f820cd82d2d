"""A clip of a corpus, why one was rejected, and how clips are cut: what readers, cutting and packing speak of."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from sltscale.data.video.presets import PRESETS
from sltscale.errors import InputError

SPLITS = ("train", "dev", "test")
ASPECTS = ("squash", "keep")
# Limits of stored clips; a frame of this size is just below the limit on pixels in video/limits.py.
MAX_FRAME_SIZE = 2998
MAX_FPS = 1000
MAX_MARGIN = 10


@dataclass(frozen=True, slots=True)
class Clip:
    """One sentence and where its pictures lie.

    id: as in the corpus. path: source video, or a folder of images. start, end: exact seconds in it (None = the
    beginning, the end). language: BCP-47. split: train, dev or test. line, file: where it stands in which annotation
    file (by name). signer: as in the corpus. crop: (left, top, width, height) in pixels of the upright source.
    images: names in the folder, in order (empty = all of its images by name). fps: of a folder of images.
    """

    id: str
    path: Path
    start: Fraction | None
    end: Fraction | None
    text: str
    language: str
    split: str
    line: int = 0
    signer: str = ""
    crop: tuple[int, int, int, int] | None = None
    images: tuple[str, ...] = ()
    fps: Fraction | None = None
    file: str = ""


@dataclass(frozen=True)
class Rejected:
    """A clip that is not packed. split: empty if the row does not say. file: the annotation file's name."""

    id: str
    line: int
    reason: str
    split: str = ""
    file: str = ""


@dataclass(frozen=True)
class Cutting:
    """How clips are cut and stored.

    frame_size: height and width of stored frames, even. fps: frames per second to keep at most, chosen from the
    source's own frames (None = all of them). aspect: "squash" to the square, or "keep" and fill with black. margin: by
    which the crop box of a clip is grown on each side, as a share of its size. crop: one box for all clips that have
    none of their own, as (left, top, right, bottom) shares of the upright source. preset: a name of
    ``presets.PRESETS``. InputError for values outside these.
    """

    frame_size: int
    fps: Fraction | None = None
    aspect: str = "squash"
    margin: float = 0.0
    preset: str = "h264"
    crop: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            close = difflib.get_close_matches(self.preset, PRESETS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(PRESETS)}"
            raise InputError(f"unknown preset {self.preset!r}; {hint}")
        least = PRESETS[self.preset].min_size
        if self.frame_size % 2 or not least <= self.frame_size <= MAX_FRAME_SIZE:
            raise InputError(
                f"frame size {self.frame_size}: expected an even number of pixels from {least} up "
                f"to {MAX_FRAME_SIZE} for preset {self.preset}"
            )
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise InputError(f"{float(self.fps):g} frames per second: expected more than 0 and at most {MAX_FPS}")
        if self.aspect not in ASPECTS:
            raise InputError(f"unknown aspect {self.aspect!r}; expected one of {', '.join(ASPECTS)}")
        if not 0 <= self.margin <= MAX_MARGIN:
            raise InputError(f"margin {self.margin:g}: expected a share of the box from 0 to {MAX_MARGIN}")
        if self.crop is not None:
            left, top, right, bottom = self.crop
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise InputError(
                    f"crop {left:g},{top:g},{right:g},{bottom:g}: expected left < right and top < bottom, "
                    "as shares of width and height from 0 to 1"
                )
