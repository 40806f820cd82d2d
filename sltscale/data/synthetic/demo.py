"""The embedded default corpus, drawn and packed when a recipe asks for it and its shards are missing."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from sltscale.config import DataSettings
from sltscale.data.clips import Cutting
from sltscale.data.shards.index import open_index, splits
from sltscale.data.shards.writing import make_shards
from sltscale.data.synthetic.corpus import ANNOTATIONS, VIDEOS, make_corpus
from sltscale.errors import InputError


def ensure_synthetic_shards(settings: DataSettings) -> None:
    """Make ``settings.shards`` from the synthetic corpus if it is missing; one process does it, the others wait.

    Does nothing for a recipe of a real corpus. Raises InputError if the folder holds other shards.
    """
    if settings.synthetic is None:
        return
    wanted = settings.synthetic
    corpus = f"synthetic-{wanted.language}-{wanted.clips}-{wanted.seed}"
    folder = Path(settings.shards)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if {"train", "dev", "test"} <= set(splits(folder)):
            found = open_index(folder, "train")
            if (found.corpus, found.frame_size) != (corpus, settings.frame_size):
                raise InputError(
                    f"{folder} holds {found.corpus} at {found.frame_size} px, the recipe wants {corpus} at "
                    f"{settings.frame_size} px; delete the folder or set data.shards"
                )
            return
        print(f"{folder} is missing: drawing the synthetic corpus ({wanted.clips} clips) and packing it", flush=True)
        # Beside the shards, under a fixed name: an interrupted drawing or packing goes on where it was.
        source = folder.parent / f".{folder.name}-{corpus}"
        annotations = source / ANNOTATIONS
        if not annotations.is_file():  # written last
            make_corpus(source, clips=wanted.clips, seed=wanted.seed, language=wanted.language)
        make_shards(
            corpus="openasl",
            annotations=[annotations],
            videos=source / VIDEOS,
            out=folder,
            cutting=Cutting(settings.frame_size),
            language=wanted.language,
            name=corpus,
        )
        shutil.rmtree(source)
