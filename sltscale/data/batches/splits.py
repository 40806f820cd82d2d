"""The splits that a recipe trains and is scored on: opened, their shards compared with the index, damage dealt with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sltscale import parallel
from sltscale.config import DataSettings
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.plan import Part
from sltscale.data.batches.selection import Selection
from sltscale.data.shards.features import check_features
from sltscale.data.shards.index import Index, open_index
from sltscale.data.shards.verify import bad_clips, check_shards
from sltscale.errors import InputError

BadClips = list[dict[str, Any]]


def open_splits(settings: DataSettings, known: Iterable[dict[str, Any]] = ()) -> tuple[dict[str, Selection], BadClips]:
    """train (with the corpora of data.mix), dev and test, and the damaged clips that they leave out. A collective.

    known: the damaged clips that this run left out before; they stay out, so that its steps stay the same. With
    data.bad_data "stop" any damage is an InputError. With "skip" the damaged clips are left out, on all ranks alike;
    InputError if they are more than the share data.max_bad_share of a split.

    With data.features these are the clips' features; InputError unless they are of all clips of data.shards, of which
    only the index is read.
    """
    first = settings.features or settings.shards
    folders = {"train": [first, *(part.shards for part in settings.mix)], "dev": [first], "test": [first]}
    selections, damaged = {}, []
    for split, places in folders.items():
        indexes = [open_index(place, split) for place in places]
        if settings.features is not None:
            check_split(indexes[0], settings)
        found = [_damaged(index, place, settings, known) for index, place in zip(indexes, places, strict=True)]
        selections[split] = Selection(indexes, [[row["clip"] for row in rows] for rows in found])
        damaged += [row for rows in found for row in rows]
    return selections, damaged


def training_parts(settings: DataSettings, train: Selection) -> list[Part] | None:
    """What an epoch takes of each corpus; None: every clip once."""
    if not settings.mix:
        return None
    return train.parts([1.0, *(part.weight for part in settings.mix)], settings.temperature)


def check_split(index: Index, settings: DataSettings) -> None:
    """InputError unless ``index`` is of the features of all clips of its split of data.shards."""
    clips = open_index(settings.shards, index.split)
    frames = frames_after_sampling(clips.frames, settings.model_copy(update={"features": None}))
    check_features(index, clips, frames, settings)


def _damaged(index: Index, place: str, settings: DataSettings, known: Iterable[dict[str, Any]]) -> BadClips:
    rank, world_size = parallel.rank(), parallel.world_size()
    if settings.bad_data == "stop":
        check_shards(index, rank, world_size)
        return []
    rows = {
        bad.clip: {"shards": place, "split": index.split, **asdict(bad)} for bad in bad_clips(index, rank, world_size)
    }
    rows |= {row["clip"]: row for row in known if (row["shards"], row["split"]) == (place, index.split)}
    if len(rows) > settings.max_bad_share * len(index):
        first = rows[min(rows)]
        raise InputError(
            f"{index.path}: {len(rows)} of {len(index)} clips are damaged, more than data.max_bad_share "
            f"{settings.max_bad_share:g} allows; the first: {first['shard']}, clip {first['key']}: {first['reason']}; "
            "restore the shards or raise the limit"
        )
    return [rows[number] for number in sorted(rows)]
