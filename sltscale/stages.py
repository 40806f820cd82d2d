"""From a recipe to scores: the stages it takes, each trained, exported and evaluated on the test split."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sltscale import config, parallel
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.splits import open_splits, training_parts
from sltscale.data.batches.stream import check_frame_size, stream
from sltscale.data.lexicon import Lexicon, build_lexicon, load_lexicon
from sltscale.data.synthetic.demo import ensure_synthetic_shards
from sltscale.data.tagging import tagger
from sltscale.data.text import TextTokenizer, build_corpus_tokenizer, load_tokenizer
from sltscale.data.word_vectors import Vectors, corpus_vectors
from sltscale.engine import checkpoint, keeping, loop, manifest
from sltscale.engine.compile_lock import heal_stale_compile_locks
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.finished import whole_weights
from sltscale.engine.rendezvous import LIMIT_SECONDS, WITHIN
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.signals import StoppedError, StopRequest
from sltscale.engine.telemetry import Telemetry
from sltscale.engine.watchdog import Watchdog
from sltscale.errors import InputError
from sltscale.evaluation.splits import evaluate_split, text_samples
from sltscale.extraction import encoder_of_features, extract
from sltscale.methods import export
from sltscale.methods.attention import set_attention
from sltscale.methods.encoder import save_encoder
from sltscale.preflight import Stage, check_bleurt, weights_dtype
from sltscale.stage_report import Scores, brief, count_truncated, introduce, read_scores, summarise


def run(stages: list[Stage], deepspeed_json: dict[str, Any]) -> None:
    """Train the stages one after the other, print the table. Everything that can be refused is, before work starts.

    Raises InputError for bad input, StoppedError when a signal ended it with its state saved.
    """
    began = time.perf_counter()
    with Watchdog(stages[0].recipe.train.watchdog_seconds) as watchdog:
        _run_stages(stages, deepspeed_json, watchdog, began)


def _run_stages(stages: list[Stage], deepspeed_json: dict[str, Any], watchdog: Watchdog, began: float) -> None:
    watchdog.watch("the start-up")
    for line in heal_stale_compile_locks():
        print(line, file=sys.stderr, flush=True)
    for stage in stages:
        ensure_synthetic_shards(stage.recipe.data)
    # Longer than it may take: the watchdog does not know who is missing.
    watchdog.watch("the meeting of the ranks", times=WITHIN)
    longest = max(stage.recipe.train.watchdog_seconds for stage in stages)
    device = start_processes(min(LIMIT_SECONDS, watchdog.seconds), longest)
    watchdog.watch("the start-up")
    check_bleurt(stages)
    scores: list[Scores] = []
    for stage in stages:
        scores.append(train_stage(stage, deepspeed_json, device, watchdog, began))
        began = time.perf_counter()
    parallel.on_rank_zero(lambda: summarise(stages, scores))


def train_stage(
    stage: Stage, deepspeed_json: dict[str, Any], device: torch.device, watchdog: Watchdog, began: float
) -> Scores:
    """Train to the end (from the last good checkpoint, if there is one), export, score the test split.

    began: ``perf_counter`` when the work for this stage began.
    """
    recipe, folder = stage.recipe, stage.folder
    watchdog.seconds = recipe.train.watchdog_seconds
    watchdog.watch(f"the preparation of {recipe.name}")
    if isinstance(recipe.method, config.FeatureSettings):
        assert stage.starts_from is not None
        extract(recipe, recipe.method, folder, stage.starts_from, deepspeed_json, device, watchdog, began)
        return {}
    status = parallel.on_rank_zero(folder.status)
    if status["state"] == "finished":
        if parallel.rank() == 0:
            print(f"{recipe.name}: already finished, see {folder.path}", flush=True)
        return read_scores(folder)

    # All that can be refused is, before the folder is touched.
    known = parallel.on_rank_zero(folder.bad_clips)
    splits, damaged = open_splits(recipe.data, known)
    for clips in splits.values():
        check_frame_size(clips, recipe.data)
    tokenizer = _tokenizer(stage, splits["train"])
    for language in sorted({language for clips in splits.values() for language in clips.languages()}):
        tokenizer.language_id(language)
    plan = _training_plan(recipe, splits["train"])
    plan.check_world_size(parallel.world_size(), recipe.train.epochs)
    total_steps = plan.steps(recipe.train.epochs)
    latest, complaints = _latest(stage, plan)
    lexicon = lexicon_of(stage, splits["train"])
    encoder = None
    if recipe.data.features is not None and stage.starts_from is not None:
        encoder = encoder_of_features(recipe, stage.starts_from, splits)
    method = export.build(recipe, tokenizer, lexicon)
    if stage.starts_from is not None and recipe.start is not None:
        export.transfer(method, stage.starts_from, recipe.start.parts, recipe.start.fresh)
    attention = set_attention(recipe, method, device, weights_dtype(deepspeed_json))
    engine = build_engine(
        method.to(device), recipe.optim, deepspeed_json, micro_batches=recipe.data.micro_frames is not None
    )

    digests = {split: clips.digest for split, clips in splits.items()}
    folder.join(parallel.on_rank_zero(lambda: folder.open(recipe, deepspeed_json, digests, parallel.world_size())))
    watchdog.folder = folder
    parallel.on_rank_zero(lambda: folder.record_bad_clips(damaged))
    parallel.on_rank_zero(lambda: tokenizer.save(folder.tokenizer))
    if lexicon is not None:
        parallel.on_rank_zero(lambda: lexicon.save(folder.lexicon))
    if encoder is not None:
        parallel.on_rank_zero(lambda: save_encoder(folder.encoder, encoder))
    # Checkpoints are verified before weights are built, and the folder is locked after that.
    if parallel.on_rank_zero(lambda: _something_came_between(folder, latest, complaints)):
        latest, complaints = _latest(stage, plan)
    first_step = 0
    if latest is not None:
        checkpoint.restore(engine, latest)
        first_step = latest.step
    telemetry = Telemetry(recipe.name, folder if parallel.rank() == 0 else None, first_step, total_steps)
    for complaint in complaints:
        telemetry.say(f"warning: {complaint}; going on from an earlier one")
    introduce(stage, telemetry, method, plan, first_step, deepspeed_json)
    for line in attention:
        telemetry.say(f"{recipe.name}: {line}")
    count_truncated(telemetry, tokenizer, splits["train"])
    if damaged:
        telemetry.say(f"warning: {len(damaged)} damaged clips are left out, see {folder.path / 'bad_clips.jsonl'}")

    def evaluate(committed: checkpoint.Checkpoint) -> None:
        folder.check_owner()
        epoch = plan.epoch_of(committed.step)
        out = folder.path / "evaluation" / f"dev-epoch-{epoch:04d}"
        scores = _score(stage, tokenizer, lexicon, committed, splits["dev"], out, device)
        folder.check_owner()  # that took minutes
        best = recipe.train.keep_best
        parallel.on_rank_zero(lambda: keeping.note_scores(folder.checkpoints, committed.step, scores, best))
        telemetry.scalars(committed.step, "dev", scores)
        telemetry.samples(committed.step, text_samples(out, recipe.evaluation.samples))
        telemetry.say(f"{recipe.name} dev after epoch {epoch}: {brief(scores)}")

    batches = stream(
        splits["train"],
        plan,
        recipe.data,
        seed=recipe.seed,
        rank=parallel.rank(),
        world_size=parallel.world_size(),
        first_step=first_step,
        last_step=total_steps,
        training=True,
    )
    watchdog.rest()
    if latest is not None and loop.evaluation_due(plan, first_step, recipe):
        scored = parallel.on_rank_zero(lambda: keeping.read_scores(folder.checkpoints))
        if first_step not in scored:  # the last attempt ended before it had come to it
            evaluate(latest)
    with StopRequest() as stop:
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
            stop=stop,
            watchdog=watchdog,
            seconds_before=status["seconds"] + time.perf_counter() - began,
            evaluate=evaluate,
        )
        seconds = status["seconds"] + time.perf_counter() - began
        if step < total_steps:
            if parallel.rank() == 0:
                folder.set_status("stopped", step=step, seconds=seconds)
                telemetry.close()
            parallel.barrier()  # the launcher ends the ranks that are left when the first one is gone
            raise StoppedError(f"{recipe.name}: stopped by a signal after step {step}, saved; the same command goes on")
    if parallel.rank() == 0:
        folder.set_status("trained", step=step, seconds=seconds)
    engine.destroy()
    scores = _export_and_score(stage, tokenizer, lexicon, splits["test"], telemetry, step, device)
    if parallel.rank() == 0:
        seconds = status["seconds"] + time.perf_counter() - began
        folder.set_status("finished", step=step, seconds=seconds)
        telemetry.close()
    watchdog.folder = None
    folder.close()
    parallel.barrier()
    return scores


def _export_and_score(
    stage: Stage,
    tokenizer: TextTokenizer,
    lexicon: Lexicon | None,
    test: Selection,
    telemetry: Telemetry,
    step: int,
    device: torch.device,
) -> Scores:
    stage.folder.check_owner()
    final = parallel.on_rank_zero(lambda: _selected(stage, step))
    if final.step != step:
        telemetry.say(f"{stage.recipe.name}: the best is the checkpoint of step {final.step}, which the run ends in")
    whole = stage.recipe.on_video()
    parallel.on_rank_zero(
        lambda: export.save_export(stage.folder.export, whole, whole_weights(stage.folder, final), tokenizer, lexicon)
    )
    out = stage.folder.path / "evaluation" / "test"
    scores = _score(stage, tokenizer, lexicon, final, test, out, device)
    telemetry.scalars(step, "test", scores)
    telemetry.say(f"{stage.recipe.name} test: {brief(scores)}")
    return scores


def _selected(stage: Stage, step: int) -> checkpoint.Checkpoint:
    """The checkpoint that the finished run stands for: the last or the best, as the recipe says."""
    settings, checkpoints = stage.recipe.train, stage.folder.checkpoints
    best = keeping.best_step(checkpoints, settings.keep_best, step) if settings.select == "best" else None
    return manifest.verify(checkpoints / f"step-{step if best is None else best:08d}")


def _latest(stage: Stage, plan: Plan) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint to go on from, if there is one, and what is wrong with newer ones; a collective."""
    latest, complaints = parallel.on_rank_zero(lambda: checkpoint.latest_checkpoint(stage.folder.checkpoints))
    if latest is not None:
        manifest.check_recipe(latest, stage.recipe)
        if plan.step_at(latest.manifest["data"]) != latest.step:
            raise InputError(f"{latest.folder}: its place in the data is not that of step {latest.step}")
    return latest, complaints


def _something_came_between(folder: RunFolder, latest: checkpoint.Checkpoint | None, complaints: list[str]) -> bool:
    newest = manifest.folders(folder.checkpoints)[-1 - len(complaints) :]
    return (newest[0] if len(newest) > len(complaints) else None) != (latest.folder if latest is not None else None)


def _score(
    stage: Stage,
    tokenizer: TextTokenizer,
    lexicon: Lexicon | None,
    committed: checkpoint.Checkpoint,
    clips: Selection,
    out: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Score a checkpoint in a plain copy of the model, so that no ZeRO stage has a say in decoding."""
    method = export.build(stage.recipe, tokenizer, lexicon)
    export.load_weights(method, checkpoint.assemble(committed), str(committed.folder))
    return evaluate_split(method.to(device).eval(), tokenizer, stage.recipe, clips, out, device)


def _training_plan(recipe: config.Recipe, train: Selection) -> Plan:
    lengths = frames_after_sampling(train.frames, recipe.data)
    return Plan(
        lengths,
        recipe.seed,
        BatchRule.of(recipe.data),
        parts=training_parts(recipe.data, train),
        micro_frames=recipe.data.micro_frames,
    )


def _tokenizer(stage: Stage, train: Selection) -> TextTokenizer:
    """The one the run began with, or the recipe's."""
    text, prompts = stage.recipe.text, stage.recipe.prompts
    if stage.folder.tokenizer.is_dir():
        return load_tokenizer(stage.folder.tokenizer, text.max_tokens, prompts)
    if text.tokenizer != "corpus":
        return load_tokenizer(text.tokenizer, text.max_tokens, prompts)
    return build_corpus_tokenizer(train.texts(), train.languages(), text.vocabulary, text.max_tokens, prompts)


def lexicon_of(stage: Stage, train: Selection) -> Lexicon | None:
    """The one the run began with, or the recipe's; none for a method that learns no pseudo-glosses."""
    method = stage.recipe.method
    if not isinstance(method, config.HFAPretrainingSettings) or method.pseudo_gloss == 0:
        return None
    if stage.folder.lexicon.is_dir():
        return load_lexicon(stage.folder.lexicon)
    if method.lexicon != "corpus":
        lexicon = load_lexicon(method.lexicon)
        lexicon.check_covers(train.texts(), method.lexicon)
        return lexicon

    def vectors(glosses: Sequence[str], sentences: Sequence[list[str]]) -> Vectors:
        return corpus_vectors(glosses, sentences, method.head_width)

    return build_lexicon(train.texts(), tagger("words").analyse, vectors, origin={"tagger": "words"})
