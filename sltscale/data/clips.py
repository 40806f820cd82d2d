"""A clip of a corpus, why one was rejected, and how clips are cut: what readers, cutting and packing speak of."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Clip:
    """One sentence and where its pictures lie.

    id: as in the corpus. path: source video, or a folder of images. start, end: exact seconds in it (None = the
    beginning, the end). language: BCP-47. split: train, dev or test. line: of the annotation file (0 = it has none).
    signer: as in the corpus. crop: (left, top, width, height) in pixels of the upright source. images: names in the
    folder, in order (empty = all of its images by name). fps: of a folder of images.
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
    which a crop box is grown on each side, as a share of its size. preset: a name of ``encoding.PRESETS``.
    """

    frame_size: int
    fps: Fraction | None = None
    aspect: str = "squash"
    margin: float = 0.0
    preset: str = "h264"
