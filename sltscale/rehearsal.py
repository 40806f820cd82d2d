"""``train.py --dry-run``: whatever can go wrong after hours in a queue, tried in a minute on CPU ranks.

The engine settings, the recipe's optimizer rules and its plan are the real ones; two steps are taken with a model of
the same parts and depth at small widths, on few short clips of the real shards. Nothing is written but to a temporary
folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sltscale import parallel
from sltscale.config import FeatureSettings, Recipe
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.splits import open_splits, training_parts
from sltscale.data.batches.stream import check_frame_size, stream
from sltscale.data.shards.index import splits
from sltscale.data.synthetic.demo import ensure_synthetic_shards
from sltscale.data.text import TextTokenizer, build_corpus_tokenizer, load_tokenizer
from sltscale.engine import checkpoint, fragments, loop
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.optim import parameter_groups
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.signals import StopRequest
from sltscale.engine.telemetry import Telemetry
from sltscale.engine.watchdog import Watchdog
from sltscale.errors import InputError
from sltscale.methods import export
from sltscale.methods.base import Vocabulary, build_method
from sltscale.miniature import STEPS, SYNTHETIC_SIZE, tiny_recipe, without_published_weights
from sltscale.preflight import Stage, check_bleurt
from sltscale.stages import lexicon_of

SENTENCES = 20_000  # that a tokenizer is learnt from


def rehearse(stages: list[Stage], deepspeed_json: dict[str, Any], ranks: int | None) -> None:
    """Try the checked stages; prints a few lines about each. ranks: of the real run, default as now.

    Raises InputError for whatever training would refuse, and NotSavedError or NonFiniteError as training does.
    """
    began = time.perf_counter()
    device = start_processes()
    check_bleurt(stages)
    with _temporary() as temporary, Watchdog(stages[0].recipe.train.watchdog_seconds) as watchdog:
        watchdog.watch("the dry run")
        before: Path | None = None
        for number, stage in enumerate(stages):
            _check_start(stage)
            if isinstance(stage.recipe.method, FeatureSettings):
                _say(f"{stage.recipe.name}: trains nothing, its features are not written; what comes next reads video")
                continue
            place = temporary / str(number)
            before = _rehearse_stage(stage, place, before, deepspeed_json, device, watchdog, ranks)
        watchdog.rest()
    _say(f"dry run: passed in {time.perf_counter() - began:.0f} s; nothing was written to {stages[-1].folder.path}")


def _rehearse_stage(
    stage: Stage,
    place: Path,
    before: Path | None,
    deepspeed_json: dict[str, Any],
    device: torch.device,
    watchdog: Watchdog,
    ranks: int | None,
) -> Path:
    """Returns the finished tiny weights, which the next stage may start from."""
    recipe = stage.recipe
    parallel.on_rank_zero(lambda: place.mkdir())
    found = parallel.on_rank_zero(lambda: _has_shards(recipe))
    drawn = place.with_name(f"drawn-{min(SYNTHETIC_SIZE, recipe.data.frame_size)}")  # once for all stages
    tiny = tiny_recipe(recipe, parallel.world_size(), None if found else drawn)
    if not found:
        parallel.on_rank_zero(lambda: ensure_synthetic_shards(tiny.data))
    selections, damaged = open_splits(tiny.data)
    train = selections["train"]
    check_frame_size(train, tiny.data)
    if found:
        _say(f"{recipe.name}: {check_coverage(recipe, train, ranks or parallel.world_size())}")
    else:
        _say(f"{recipe.name}: no shards at {recipe.data.shards}: steps on drawn clips, the plan not looked at")
    if damaged:
        _say(f"{recipe.name}: {len(damaged)} damaged clips would be left out")
    tokenizer = _tokenizer(tiny, train)
    rehearsed = dataclasses.replace(stage, recipe=tiny, folder=RunFolder(place / "run"), starts_from=None)
    lexicon = lexicon_of(rehearsed, train)
    real = check_rules(recipe, export.vocabulary(tokenizer, lexicon))

    def engine_of(settings: Recipe) -> Any:
        method = export.build(settings, tokenizer, lexicon)
        if before is not None and recipe.start is not None:
            export.transfer(method, before, recipe.start.parts, recipe.start.fresh)
        in_parts = settings.data.micro_frames is not None
        return build_engine(method.to(device), settings.optim, deepspeed_json, micro_batches=in_parts)

    folder = rehearsed.folder
    digests = {split: clips.digest for split, clips in selections.items()}
    folder.join(parallel.on_rank_zero(lambda: folder.open(tiny, deepspeed_json, digests, parallel.world_size())))
    engine = engine_of(tiny)
    losses = _two_steps(engine, tiny, train, tokenizer, folder, device, watchdog)
    stage_number = engine.zero_optimization_stage()
    small = sum(math.prod(shape) for shape in fragments.parameter_shapes(engine).values())
    _say(
        f"{recipe.name}: {STEPS} steps at ZeRO {stage_number} on {parallel.world_size()} CPU ranks, with "
        f"{small / 1e6:.2f} M parameters in place of {real / 1e6:.2f} M: losses {losses[0]:.3f} and {losses[1]:.3f}"
    )
    committed, pieces = read_back(engine, lambda: engine_of(tiny), folder)
    _say(f"{recipe.name}: checkpoint of {pieces} pieces on rank 0 written, read back, equal in every bit")
    parallel.on_rank_zero(
        lambda: export.save_export(folder.export, tiny, checkpoint.assemble(committed), tokenizer, lexicon)
    )
    folder.close()
    return folder.export


def _two_steps(
    engine: Any,
    tiny: Recipe,
    train: Selection,
    tokenizer: TextTokenizer,
    folder: RunFolder,
    device: torch.device,
    watchdog: Watchdog,
) -> list[float]:
    plan = _plan(tiny, train)
    telemetry = Telemetry(tiny.name, folder if parallel.rank() == 0 else None, 0, STEPS)
    batches = stream(
        train,
        plan,
        tiny.data,
        seed=tiny.seed,
        rank=parallel.rank(),
        world_size=parallel.world_size(),
        first_step=0,
        last_step=STEPS,
    )
    with StopRequest() as stop:
        loop.train(
            engine,
            tiny,
            plan,
            batches,
            tokenizer,
            folder=folder,
            telemetry=telemetry,
            first_step=0,
            device=device,
            stop=stop,
            watchdog=watchdog,
            seconds_before=0.0,
            evaluate=lambda committed: None,
        )
    watchdog.watch("the dry run")
    parallel.barrier()
    rows = parallel.on_rank_zero(lambda: (folder.path / "steps.jsonl").read_text().splitlines())
    losses = [json.loads(row).get("loss", math.nan) for row in rows]
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        raise InputError(f"recipe {tiny.name}: the dry run's losses are {losses}; expected {STEPS} finite ones")
    return losses


def read_back(engine: Any, another: Callable[[], Any], folder: RunFolder) -> tuple[checkpoint.Checkpoint, int]:
    """Restore the newest checkpoint into another engine and compare it with ``engine``, which wrote it and is ended:
    (the checkpoint, how many pieces of weights and state this rank compared). InputError if any differs."""
    written = list(_pieces(engine))
    engine.destroy()
    committed, complaints = checkpoint.latest_checkpoint(folder.checkpoints)
    if committed is None or complaints:
        raise InputError(f"the dry run's checkpoint was not found again: {'; '.join(complaints) or 'there is none'}")
    restored = another()
    checkpoint.restore(restored, committed)
    read = list(_pieces(restored))
    restored.destroy()
    different = [name for (name, ours), (_, theirs) in zip(written, read, strict=True) if not torch.equal(ours, theirs)]
    if different:
        raise InputError(f"the dry run's checkpoint reads back differently: {', '.join(different[:3])}")
    return committed, len(read)


def _pieces(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of the weights and optimizer state that this rank holds, by name."""
    state = fragments.torch_optimizer(engine).state
    for fragment in fragments.held_fragments(engine):
        yield fragment.name, fragment.view(fragment.flat).clone()
        for key, value in sorted(state.get(fragment.flat, {}).items()):
            if value.shape == fragment.flat.shape:
                yield f"{fragment.name} {key}", fragment.view(value).clone()


def check_rules(recipe: Recipe, vocabulary: Vocabulary) -> int:
    """The parameters of the recipe's own model, which is built without memory; InputError if its sizes do not fit
    together, or an optimizer rule names nothing."""
    settings = without_published_weights(recipe)
    with torch.device("meta"):
        method = build_method(settings.method, vocabulary, stored_tokens=recipe.data.features is not None)
    parameter_groups(method, settings.optim)
    return sum(parameter.numel() for parameter in method.parameters())


def check_coverage(recipe: Recipe, train: Selection, ranks: int) -> str:
    """Deals the first epoch of the recipe's plan to so many ranks; a line about it. InputError if a rank would get
    nothing in some step, or a clip does not come as often as it should."""
    plan = _plan(recipe.on_video(), train)
    plan.check_world_size(ranks, recipe.train.epochs)
    times = np.zeros(len(plan.lengths), dtype=np.int64)
    frames = []
    for step in range(plan.steps(1)):
        shares = plan.shares(step, ranks)
        for share in shares:
            np.add.at(times, share, 1)
        frames.append([int(plan.lengths[share].sum()) for share in shares])
    if recipe.data.mix:
        once = all(int(times[part.clips].sum()) == part.quota for part in plan.parts)
        how = "each corpus as often as its weight says"
    else:
        once, how = bool((times == 1).all()), "each exactly once"
    if not once:
        raise InputError(f"the plan does not cover the clips of {train.name}; {int((times == 0).sum())} never come")
    loads = np.array(frames)
    imbalance = float((loads.max(1) / loads.mean(1) - 1).mean())
    return (
        f"{plan.clips_per_epoch} clips an epoch in {plan.steps(1)} steps on {ranks} ranks, {how}; "
        f"{loads.min()} to {loads.max()} frames a rank and step, the busiest {100 * imbalance:.1f} % above the mean"
    )


def _plan(recipe: Recipe, train: Selection) -> Plan:
    return Plan(
        frames_after_sampling(train.frames, recipe.data),
        recipe.seed,
        BatchRule.of(recipe.data),
        parts=training_parts(recipe.data, train),
        micro_frames=recipe.data.micro_frames,
    )


def _tokenizer(tiny: Recipe, train: Selection) -> TextTokenizer:
    if tiny.text.tokenizer != "corpus":
        return load_tokenizer(tiny.text.tokenizer, tiny.text.max_tokens, tiny.prompts)
    sample = np.unique(np.linspace(0, len(train) - 1, min(SENTENCES, len(train)), dtype=np.int64)).tolist()
    texts = [train.text(clip) for clip in sample]
    text = tiny.text
    return build_corpus_tokenizer(texts, train.languages(), text.vocabulary, text.max_tokens, tiny.prompts)


def _has_shards(recipe: Recipe) -> bool:
    return "://" in recipe.data.shards or "train" in splits(recipe.data.shards)


def _check_start(stage: Stage) -> None:
    """A run that is started from must be finished; a recipe that is started from is rehearsed before."""
    start = stage.recipe.start
    if start is not None and start.run is not None and not (Path(start.run) / "export" / export.WEIGHTS).is_file():
        raise InputError(f"start.run: {start.run} holds no export/{export.WEIGHTS}; finish that run first")


@contextmanager
def _temporary() -> Iterator[Path]:
    """One folder for all ranks, gone afterwards."""
    folder = Path(parallel.on_rank_zero(lambda: tempfile.mkdtemp(prefix="sltscale-dry-run-")))
    try:
        yield folder
    finally:
        if parallel.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _say(line: str) -> None:
    if parallel.rank() == 0:
        print(line, flush=True)
