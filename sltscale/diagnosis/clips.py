"""The codecs that clips are stored with, and the shards: there, as long as indexed, readable, decodable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from sltscale.config import DataSettings, Recipe
from sltscale.data.batches.splits import check_split
from sltscale.data.clips import SPLITS
from sltscale.data.shards.features import read_tokens
from sltscale.data.shards.index import Index, open_index, splits
from sltscale.data.shards.remote import THREADS
from sltscale.data.video.encoding import SourceFrame, encode
from sltscale.data.video.limits import VideoError
from sltscale.data.video.presets import PRESETS
from sltscale.data.video.stored import decode_clip
from sltscale.diagnosis.finding import Finding
from sltscale.errors import InputError

TRIED_FRAMES, TRIED_SIZE = 3, 96
READ_SHARDS = 64  # of a split, spread over it, of each of which a clip is read


def codecs() -> Iterator[Finding]:
    """Encode and decode a few frames with every preset."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (TRIED_FRAMES, TRIED_SIZE, TRIED_SIZE, 3), np.uint8)
    frames = [SourceFrame(picture, number, 1, Fraction(1, 25)) for number, picture in enumerate(pictures)]
    working = []
    for name, preset in PRESETS.items():
        try:
            decoded = decode_clip(encode(frames, name).data)
        except (VideoError, ValueError) as error:  # ValueError: FFmpeg was built without it
            found = f"preset {name} ({preset.codec}) does not work: {error}"
            remedy = "pip install --force-reinstall --only-binary=:all: av, whose wheel holds all codecs"
            yield Finding("codecs", "fault", found, remedy)
            continue
        assert len(decoded) == TRIED_FRAMES
        working.append(name)
    if len(working) == len(PRESETS):
        yield Finding("codecs", "ok", f"{', '.join(working)}: encoded and decoded")


def shards(where: str, settings: DataSettings | None, wanted: Sequence[str] = ()) -> Iterator[Finding]:
    """One finding for each split of ``where``. settings: of the recipe that reads it; wanted: splits it must have."""
    subject = f"shards {where}"
    there = splits(where)
    if not there and settings is not None and settings.synthetic is not None and where == settings.shards:
        yield Finding(subject, "ok", "not there yet; the first start draws the synthetic corpus into it")
        return
    if absent := [split for split in wanted if split not in there] or (["train"] if not there else []):
        found = f"no index of {', '.join(absent)}; there: {', '.join(there) or 'none'}"
        yield Finding(subject, "fault", found, "pack them with tools/make_shards.py, or mend data.shards")
    for split in there:
        yield _split(subject, open_index(where, split), settings)


def features(recipe: Recipe) -> Iterator[Finding]:
    """One finding for each split of the visual tokens that the recipe reads in place of clips."""
    where = recipe.data.features
    assert where is not None
    subject = f"features {where}"
    if not splits(where) and recipe.start is not None and recipe.start.recipe is not None:
        yield Finding(subject, "ok", f"not there yet; {recipe.start.recipe}, which is run first, writes them")
        yield from shards(recipe.data.shards, recipe.data, SPLITS)
        return
    for split in SPLITS:
        index = open_index(where, split)
        check_split(index, recipe.data)
        yield _split(subject, index, None)


def _split(subject: str, index: Index, settings: DataSettings | None) -> Finding:
    remedy = f"sltscale shards verify {index.folder} names every defect; restore the files or pack again"
    if not index.columns_intact():
        return Finding(subject, "fault", f"{index.split}: the index is damaged", remedy)
    if settings is not None and index.frame_size != settings.frame_size:
        found = f"{index.split}: frames of {index.frame_size} pixels, data.frame_size is {settings.frame_size}"
        return Finding(subject, "fault", found, f"set data.frame_size to {index.frame_size} or pack again")
    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for fault in pool.map(lambda n: _wrong_size(index, n), range(len(index.shards))) if fault]
    # The last clip of each, which a cut-off file would lack.
    read = np.unique(np.linspace(0, len(index.shards) - 1, READ_SHARDS).astype(int))
    clips = (np.searchsorted(index.shard, read, side="right") - 1).tolist()
    if not faults:
        index.prefetch(clips)
        faults = [fault for clip in clips if (fault := _unreadable(index, clip))]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return Finding(subject, "fault", f"{index.split}: {faults[0]}{more}", remedy)
    found = f"{index.split}: {len(index)} clips in {len(index.shards)} shards, sizes right, a clip of {len(read)} read"
    return Finding(subject, "ok", found)


def _wrong_size(index: Index, number: int) -> str | None:
    name = index.shards[number]
    try:
        size = index.files.size(name)
    except (OSError, InputError) as error:
        return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"
    if size is None:
        return f"{name} is missing"
    expected = index.shard_bytes[number]
    return None if size == expected else f"{name} has {size} bytes instead of {expected}"


def _unreadable(index: Index, clip: int) -> str | None:
    try:
        if index.features is None:
            decode_clip(index.video_bytes(clip), [0])
        else:
            read_tokens(index, clip)
    except (InputError, VideoError) as error:
        return str(error).split("; ")[0]
    return None
