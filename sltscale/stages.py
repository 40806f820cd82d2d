"""From a recipe to scores: the stages it takes, each trained, exported and evaluated on the test split."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sltscale import config, parallel
from sltscale.data.augment import frames_after_sampling
from sltscale.data.demo import ensure_synthetic_shards
from sltscale.data.index import open_index
from sltscale.data.plan import Plan
from sltscale.data.stream import stream
from sltscale.data.text import TextTokenizer, build_corpus_tokenizer, load_tokenizer
from sltscale.data.verify import check_shards
from sltscale.engine import checkpoint, loop
from sltscale.engine.compile_lock import heal_stale_compile_locks
from sltscale.engine.deepspeed_engine import build_engine, read_deepspeed_json, start_processes
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.telemetry import Telemetry
from sltscale.errors import InputError
from sltscale.evaluation.report import table
from sltscale.evaluation.splits import evaluate_split, text_samples
from sltscale.files import write_atomically
from sltscale.methods import pretrained


@dataclasses.dataclass(frozen=True)
class Stage:
    """One recipe to run, its folder, and the finished run that its first weights come from."""

    recipe: config.Recipe
    folder: RunFolder
    starts_from: Path | None


class StoppedError(Exception):
    """A signal asked the run to stop; its state is saved."""


def run(deepspeed_path: Path, recipe_name: str, overrides: Sequence[str], run_folder: Path | None) -> None:
    """Train the recipe and what it starts from, print the table. Everything that can be refused is, before work starts.

    Raises InputError for bad input, StoppedError when a signal ended it with its state saved.
    """
    deepspeed_json = read_deepspeed_json(deepspeed_path)
    stages = plan_stages(recipe_name, overrides, run_folder)
    for stage in stages:
        stage.folder.check(stage.recipe)
    for line in heal_stale_compile_locks():
        print(line, file=sys.stderr, flush=True)
    for stage in stages:
        ensure_synthetic_shards(stage.recipe.data)
    device = start_processes()
    scores = [train_stage(stage, deepspeed_json, device) for stage in stages]
    _summarise(stages, scores)


def plan_stages(recipe_name: str, overrides: Sequence[str], run_folder: Path | None) -> list[Stage]:
    """The recipe last, before it the one it starts from, before that that one's; folders side by side.

    ``overrides`` tune the named recipe only. Raises InputError for recipes that start from each other.
    """
    recipe = config.load_recipe(recipe_name, overrides)
    path = run_folder or Path("runs") / recipe.name
    stages: list[Stage] = []
    seen: set[str] = set()
    while True:
        if recipe.name in seen:
            raise InputError(f"recipe {recipe.name} starts from itself by way of {', '.join(sorted(seen))}")
        seen.add(recipe.name)
        earlier = config.load_recipe(recipe.start.recipe) if recipe.start and recipe.start.recipe else None
        if earlier is not None:
            starts_from: Path | None = path.parent / earlier.name / "export"
        elif recipe.start is not None and recipe.start.run is not None:
            starts_from = Path(recipe.start.run) / "export"
        else:
            starts_from = None
        stages.insert(0, Stage(recipe, RunFolder(path), starts_from))
        if earlier is None:
            return stages
        recipe, path = earlier, path.parent / earlier.name


def train_stage(stage: Stage, deepspeed_json: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train to the end (from the last good checkpoint, if there is one), export, score the test split."""
    recipe, folder = stage.recipe, stage.folder
    status = folder.status()
    if status["state"] == "finished":
        if parallel.rank() == 0:
            print(f"{recipe.name}: already finished, see {folder.path}", flush=True)
        return _read_scores(folder)
    parallel.on_rank_zero(lambda: folder.open(recipe, deepspeed_json, parallel.world_size()))
    started = time.perf_counter() - status["seconds"]

    shards = Path(recipe.data.shards)
    train_index = open_index(shards, "train")
    for index in (train_index, open_index(shards, "dev"), open_index(shards, "test")):
        check_shards(index, parallel.rank(), parallel.world_size())
    tokenizer = _tokenizer(recipe)
    parallel.on_rank_zero(lambda: tokenizer.save(folder.tokenizer))
    plan = Plan(frames_after_sampling(train_index.frames, recipe.data), recipe.seed, recipe.data.global_batch)
    plan.check_world_size(parallel.world_size())
    total_steps = plan.steps(recipe.train.epochs)

    method = pretrained.build(recipe, tokenizer)
    if stage.starts_from is not None and recipe.start is not None:
        pretrained.transfer(method, stage.starts_from, recipe.start.parts)
    engine = build_engine(method.to(device), recipe.optim, deepspeed_json)
    latest, complaints = checkpoint.latest_checkpoint(folder.checkpoints)
    first_step = 0
    if latest is not None:
        checkpoint.restore(engine, latest)
        first_step = latest.step
    telemetry = Telemetry(recipe.name, folder if parallel.rank() == 0 else None, first_step, total_steps)
    for complaint in complaints:
        telemetry.say(f"warning: {complaint}; going on from an earlier one")
    _introduce(stage, telemetry, method, plan, first_step, deepspeed_json)

    def evaluate(committed: checkpoint.Checkpoint) -> None:
        epoch = committed.step // plan.batches_per_epoch
        out = folder.path / "evaluation" / f"dev-epoch-{epoch:04d}"
        scores = _score(stage, tokenizer, committed, "dev", out, device)
        telemetry.scalars(committed.step, "dev", scores)
        telemetry.samples(committed.step, text_samples(out, recipe.evaluation.samples))
        telemetry.say(f"{recipe.name} dev after epoch {epoch}: {_brief(scores)}")

    batches = stream(
        train_index,
        plan,
        recipe.data,
        seed=recipe.seed,
        rank=parallel.rank(),
        world_size=parallel.world_size(),
        first_step=first_step,
        last_step=total_steps,
        training=True,
    )
    step = loop.train(
        engine,
        recipe,
        plan,
        batches,
        tokenizer,
        folder=folder,
        telemetry=telemetry,
        first_step=first_step,
        device=device,
        evaluate=evaluate,
    )
    finished = step == total_steps
    if parallel.rank() == 0:
        folder.set_status("trained" if finished else "stopped", step=step, seconds=time.perf_counter() - started)
    if not finished:
        telemetry.close()
        raise StoppedError(f"{recipe.name}: stopped by a signal after step {step}, saved; the same command goes on")

    engine.destroy()
    scores = _export_and_score(stage, tokenizer, telemetry, step, device)
    if parallel.rank() == 0:
        folder.set_status("finished", step=step, seconds=time.perf_counter() - started)
    telemetry.close()
    folder.close()
    parallel.barrier()
    return scores


def _export_and_score(
    stage: Stage, tokenizer: TextTokenizer, telemetry: Telemetry, step: int, device: torch.device
) -> dict[str, Any]:
    final, _ = checkpoint.latest_checkpoint(stage.folder.checkpoints)
    if final is None or final.step != step:
        raise InputError(f"{stage.folder.checkpoints}: the checkpoint of step {step} does not verify")
    parallel.on_rank_zero(
        lambda: pretrained.save_pretrained(stage.folder.export, stage.recipe, checkpoint.assemble(final), tokenizer)
    )
    out = stage.folder.path / "evaluation" / "test"
    scores = _score(stage, tokenizer, final, "test", out, device)
    telemetry.scalars(step, "test", scores)
    telemetry.say(f"{stage.recipe.name} test: {_brief(scores)}")
    return scores


def _score(
    stage: Stage,
    tokenizer: TextTokenizer,
    committed: checkpoint.Checkpoint,
    split: str,
    out: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Score a checkpoint in a plain copy of the model, so that no ZeRO stage has a say in decoding."""
    method = pretrained.build(stage.recipe, tokenizer)
    pretrained.load_weights(method, checkpoint.assemble(committed), str(committed.folder))
    index = open_index(Path(stage.recipe.data.shards), split)
    return evaluate_split(method.to(device).eval(), tokenizer, stage.recipe, index, out, device)


def _tokenizer(recipe: config.Recipe) -> TextTokenizer:
    if recipe.text.tokenizer != "corpus":
        return load_tokenizer(recipe.text.tokenizer, max_tokens=recipe.text.max_tokens)
    index = open_index(Path(recipe.data.shards), "train")
    languages = sorted({index.language(number) for number in range(len(index))})
    return build_corpus_tokenizer(index.texts(), languages, recipe.text.vocabulary, max_tokens=recipe.text.max_tokens)


def _introduce(
    stage: Stage,
    telemetry: Telemetry,
    method: torch.nn.Module,
    plan: Plan,
    first_step: int,
    deepspeed_json: dict[str, Any],
) -> None:
    recipe, ranks = stage.recipe, parallel.world_size()
    stage_number = deepspeed_json.get("zero_optimization", {}).get("stage", 0)
    waste = plan.padding_and_imbalance(0, ranks)
    shapes = [getattr(p, "ds_numel", p.numel()) for p in method.parameters()]
    telemetry.say(
        f"{recipe.name}: {recipe.method.name}, {sum(shapes) / 1e6:.2f} M parameters, "
        f"{len(plan.lengths)} clips, {plan.batches_per_epoch} steps of {recipe.data.global_batch} clips an epoch, "
        f"{recipe.train.epochs} epochs; {ranks} ranks, ZeRO {stage_number}"
    )
    telemetry.say(
        f"{recipe.name}: padding {100 * waste.padding:.1f} % if padded, "
        f"frames of the busiest rank {100 * waste.imbalance:.1f} % above the mean"
    )
    if stage.starts_from is not None and recipe.start is not None:
        telemetry.say(f"{recipe.name}: {', '.join(recipe.start.parts)} from {stage.starts_from}")
    if first_step:
        telemetry.say(f"{recipe.name}: going on from the checkpoint of step {first_step}")


def _brief(scores: dict[str, Any]) -> str:
    return " ".join(f"{name} {value:.2f}" for name, value in scores.items() if isinstance(value, int | float))


def _read_scores(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "evaluation" / "test" / "metrics.json").read_text())


def _summarise(stages: list[Stage], scores: list[dict[str, Any]]) -> None:
    """summary.json of the last run - the scores of all stages side by side - and the table on the terminal."""
    if parallel.rank() != 0:
        return
    folder = stages[-1].folder.path
    seconds = {stage.recipe.name: stage.folder.status()["seconds"] for stage in stages}
    summary: dict[str, Any] = {}
    for values in scores:
        summary |= {name: value for name, value in values.items() if isinstance(value, int | float)}
    summary |= {"seconds": sum(seconds.values()), "stages": seconds}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    shown = ("bleu1", "bleu4", "bleu4_shuffled", "chrf", "rouge_l", "t2v_recall@1", "v2t_recall@1", "t2v_recall@5")
    rows = [["stage (test split)", *shown, "minutes"]]
    for stage, values in zip(stages, scores, strict=True):
        cells = [f"{values[name]:.2f}" if name in values else "-" for name in shown]
        rows.append([stage.recipe.name, *cells, f"{seconds[stage.recipe.name] / 60:.1f}"])
    print(table(rows))
    print(f"run folder: {folder}", flush=True)
