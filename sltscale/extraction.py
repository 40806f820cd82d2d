"""Stages that write features, and what a stage that reads them keeps: the encoder that they were made with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltscale import parallel
from sltscale.config import FeatureSettings, Recipe, RetrievalSettings, TranslationSettings
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.splits import open_splits
from sltscale.data.batches.stream import check_frame_size
from sltscale.data.shards.index import splits
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.telemetry import Telemetry
from sltscale.engine.watchdog import Watchdog
from sltscale.errors import InputError
from sltscale.evaluation.features import write_features
from sltscale.methods.encoder import build_encoder, encoder_digest, read_encoder
from sltscale.methods.export import save_part


def extract(
    recipe: Recipe,
    settings: FeatureSettings,
    folder: RunFolder,
    starts_from: Path,
    deepspeed_json: dict[str, Any],
    device: torch.device,
    watchdog: Watchdog,
    began: float,
) -> None:
    """Write the features of the recipe's clips, made by the visual encoder of the export ``starts_from``, which the
    run's own export holds too; a collective.

    Goes on where an earlier start ended. began: ``perf_counter`` when the work for this stage began.
    """
    status = parallel.on_rank_zero(folder.status)
    if status["state"] == "finished" and {"train", "dev", "test"} <= set(splits(settings.folder)):
        if parallel.rank() == 0:
            print(f"{recipe.name}: already finished, see {settings.folder}", flush=True)
        return
    weights = read_encoder(starts_from)
    digest = encoder_digest(settings.visual, weights)
    encoder = build_encoder(settings.visual, weights, str(starts_from)).to(device)
    known = parallel.on_rank_zero(folder.bad_clips)
    selections, damaged = open_splits(recipe.data, known)
    for clips in selections.values():
        check_frame_size(clips, recipe.data)
    digests = {split: clips.digest for split, clips in selections.items()}
    folder.join(parallel.on_rank_zero(lambda: folder.open(recipe, deepspeed_json, digests, parallel.world_size())))
    watchdog.folder = folder
    parallel.on_rank_zero(lambda: folder.record_bad_clips(damaged))
    parallel.on_rank_zero(lambda: save_part(folder.export, recipe, weights))
    telemetry = Telemetry(recipe.name, folder if parallel.rank() == 0 else None, 0, 0)
    count = sum(map(len, selections.values()))
    telemetry.say(f"{recipe.name}: visual tokens of {count} clips by the encoder of {starts_from}, {digest[:12]}")
    if damaged:
        telemetry.say(f"warning: {len(damaged)} damaged clips are left out, see {folder.path / 'bad_clips.jsonl'}")
    write_features(encoder, digest, recipe, settings, selections, device, watchdog.watch)
    telemetry.say(f"{recipe.name}: written and compared with their indexes: {settings.folder}")
    if parallel.rank() == 0:
        folder.set_status("finished", step=0, seconds=status["seconds"] + time.perf_counter() - began)
        telemetry.close()
    watchdog.folder = None
    folder.close()
    parallel.barrier()


def encoder_of_features(recipe: Recipe, starts_from: Path, splits: Mapping[str, Selection]) -> dict[str, Tensor]:
    """The weights of the encoder that the recipe's features were made with; InputError if the run ``starts_from`` has
    another one."""
    assert isinstance(recipe.method, TranslationSettings | RetrievalSettings)
    weights = read_encoder(starts_from)
    digest = encoder_digest(recipe.method.visual, weights)
    for clips in splits.values():
        for index in clips.indexes:
            if index.features is not None and index.features.encoder != digest:
                raise InputError(
                    f"{index.path} was made with encoder {index.features.encoder[:12]}, that of {starts_from} and "
                    f"method.visual is {digest[:12]}; start from the run that they were made with, or write them again"
                )
    return weights
