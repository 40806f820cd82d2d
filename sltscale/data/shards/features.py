"""Shards of features: the visual tokens of every clip of a split in place of its video, and what they were made of.

They are shards as those of video are, with a KEY.safetensors where those have a KEY.mp4, and in their index a visual
token stands where those have a frame.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sltscale.config import DataSettings
from sltscale.errors import InputError

if TYPE_CHECKING:
    from sltscale.data.shards.index import Index

MEMBER = "safetensors"
TENSOR = "tokens"
MAX_WIDTH = 1 << 16
FRAME_SETTINGS = ("frame_size", "crop_size", "sampling_rate", "max_frames")
DTYPES = {"float32": np.float32, "float16": np.float16}
AGAIN = "write them again, into another folder"


@dataclass(frozen=True)
class Origin:
    """What the features of a split are made of.

    encoder: sha256 of the visual encoder (``methods.encoder``). shards: sha256 of the clips' index. without: numbers of
    clips in that index which were damaged, and have no features. width, dtype: of a token. frame_size, crop_size,
    sampling_rate, max_frames: as in DataSettings, how a clip became frames.
    """

    encoder: str
    shards: str
    without: tuple[int, ...]
    width: int
    dtype: str
    frame_size: int
    crop_size: int
    sampling_rate: float
    max_frames: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "without": list(self.without)}

    @classmethod
    def from_json(cls, facts: Any) -> Origin:
        """ValueError, TypeError or KeyError if it is not one."""
        origin = cls(**{**{field.name: facts[field.name] for field in fields(cls)}, "without": tuple(facts["without"])})
        if origin.dtype not in DTYPES or not 0 < origin.width <= MAX_WIDTH:
            raise ValueError(f"features of {origin.width} {origin.dtype}")
        return origin


def encode_tokens(tokens: npt.NDArray[np.float32], dtype: str) -> bytes:
    """[n, width] as a safetensors file."""
    return save({TENSOR: np.ascontiguousarray(tokens, DTYPES[dtype])})


def read_tokens(index: Index, clip: int) -> npt.NDArray[Any]:
    """The visual tokens of a clip, [n, width]; InputError naming shard and clip if they are not those of the index."""
    data = index.clip_bytes(clip)
    assert index.features is not None
    expected = (int(index.frames[clip]), index.features.width)
    try:
        tokens = load(data)[TENSOR]
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{index.describe(clip)}: no tokens in it ({error}); {AGAIN}") from None
    if tokens.shape != expected or tokens.dtype != DTYPES[index.features.dtype]:
        found = f"{tokens.dtype} {tokens.shape}, expected {index.features.dtype} {expected}"
        raise InputError(f"{index.describe(clip)}: its tokens are {found}; {AGAIN}")
    return tokens


def check_features(index: Index, clips: Index, frames: npt.NDArray[np.integer], settings: DataSettings) -> None:
    """InputError if ``index`` is not one of the features of every clip of ``clips``, in the same order, made as
    ``settings`` say, with a token for each of the ``frames`` [n] that these use."""
    origin = index.features
    if origin is None:
        raise InputError(f"{index.path} holds video, not features; give it as data.shards, or data.features none")
    if origin.shards != clips.digest:
        raise InputError(f"{index.path} holds features of other shards than {clips.folder} has now; {AGAIN}")
    for name in FRAME_SETTINGS:
        found, asked = getattr(origin, name), getattr(settings, name)
        if found != asked:
            raise InputError(
                f"{index.path} was made with data.{name} {found}, the recipe has {asked}; set it to {found}"
            )
    left_out = set(origin.without)
    expected = [
        (name, length)
        for clip, (name, length) in enumerate(zip(clips.ids(), frames.tolist(), strict=True))
        if clip not in left_out
    ]
    stored = list(zip(index.ids(), index.frames.tolist(), strict=True))
    if len(stored) != len(expected):
        raise InputError(
            f"{index.path} holds features of {len(stored)} clips, {clips.path} has {len(expected)} that they could be "
            f"of; {AGAIN}"
        )
    if stored != expected:
        number = next(number for number, pair in enumerate(stored) if pair != expected[number])
        (name, tokens), (wanted, length) = stored[number], expected[number]
        raise InputError(
            f"{index.path}: clip {number} is {name} with {tokens} tokens, in {clips.path} it is {wanted} with {length} "
            f"frames to use, a token for each; {AGAIN}"
        )
