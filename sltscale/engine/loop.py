"""The training loop: batch, loss over the global batch, step, and what surrounds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sltscale import parallel
from sltscale.config import Recipe
from sltscale.data.batches.plan import Plan
from sltscale.data.text import TextTokenizer
from sltscale.engine import checkpoint
from sltscale.engine.accumulate import accumulate
from sltscale.engine.finite import FiniteSteps, marked
from sltscale.engine.global_loss import Totals, global_loss
from sltscale.engine.keeping import ReadBack
from sltscale.engine.optim import evaluate_frozen
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.schedules import Progress, set_learning_rate
from sltscale.engine.signals import StopRequest
from sltscale.engine.telemetry import Telemetry
from sltscale.engine.watchdog import Watchdog
from sltscale.structures import LossOutput, VideoBatch


def train(
    engine: Any,
    recipe: Recipe,
    plan: Plan,
    batches: Iterable[tuple[int, VideoBatch]],
    tokenizer: TextTokenizer,
    *,
    folder: RunFolder,
    telemetry: Telemetry,
    first_step: int,
    device: torch.device,
    stop: StopRequest,
    watchdog: Watchdog,
    seconds_before: float,
    evaluate: Callable[[checkpoint.Checkpoint], None],
) -> int:
    """Run from ``first_step`` to the end or to a signal; returns the number of steps done.

    A checkpoint is committed every ``train.checkpoint_every`` steps, at the end, when a signal asked the run to stop,
    and where an evaluation is due (``evaluation_due``); ``evaluate`` is then called with it on all ranks. A step that
    is not finite is skipped; NonFiniteError ends the run after ``train.max_skipped`` in a row. seconds_before: what
    earlier attempts and the preparation took.
    """
    total_steps = plan.steps(recipe.train.epochs)
    engine.train()
    evaluate_frozen(engine.module)
    steps, read_back = FiniteSteps(engine, recipe.train.max_skipped), ReadBack()
    step = first_step
    started = waiting = time.perf_counter()
    watchdog.watch(f"step {step}, or the start of reading data")
    for number, cpu_batch in batches:
        waited = time.perf_counter() - waiting
        progress = Progress.of(plan, number, recipe.train.epochs)
        lr = set_learning_rate(engine.optimizer, progress, recipe.optim)
        sizes = [len(part) for part in plan.micro_batches(number, parallel.world_size())[parallel.rank()]]
        parts = cpu_batch.split(sizes)
        tokenise, draw = engine.module.tokenise, (recipe.seed, number)
        micro_batches = [(part, tokenise(tokenizer.encode, part, draw)) for part in parts]
        # Random numbers are a function of the step, so that there is no state of theirs to save.
        seeds = [_seed(recipe.seed, number, parallel.rank(), place) for place in range(len(sizes))]

        def gradients(
            cpu_batch: VideoBatch = cpu_batch, micro_batches: Any = micro_batches, seeds: list[int] = seeds
        ) -> Totals:
            if recipe.data.micro_frames is None:
                torch.manual_seed(seeds[0])
                outputs: dict[str, LossOutput] = engine(*(part.to(device) for part in micro_batches[0]))
            else:
                outputs = accumulate(engine, micro_batches, seeds, device)
            loss, totals = global_loss(outputs, engine.module.weights, cpu_batch, stop.received is not None)
            if recipe.data.micro_frames is None:
                engine.backward(marked(loss))
            return totals

        totals, not_finite = steps.take(number, cpu_batch, gradients)
        step = number + 1
        folder.check_owner()
        if not_finite is None:
            telemetry.step(number, totals, lr, clips=len(plan.batch(number)), waited=waited)
        else:
            telemetry.skipped(number, not_finite)
        if step % recipe.train.log_every == 0 or step == total_steps:
            telemetry.report(step, plan.epoch_of(number), lr)
        evaluating = evaluation_due(plan, step, recipe)
        if totals.stop or evaluating or step == total_steps or step % recipe.train.checkpoint_every == 0:
            paused = time.perf_counter()
            watchdog.watch(f"saving step {step}")
            _complain(telemetry, read_back)
            damaged = read_back.damaged
            committed = checkpoint.save_checkpoint(engine, folder, recipe, step, plan.state(step), damaged)
            if parallel.rank() == 0:
                read_back.start(committed)
                folder.set_status("running", step=step, seconds=seconds_before + paused - started)
            if evaluating and (not totals.stop or step == total_steps):
                watchdog.rest()
                evaluate(committed)
            telemetry.exclude(time.perf_counter() - paused)
        if totals.stop:
            break
        waiting = time.perf_counter()
        watchdog.watch(f"step {step}")
    watchdog.rest()
    _complain(telemetry, read_back)
    return step


def evaluation_due(plan: Plan, step: int, recipe: Recipe) -> bool:
    """Whether the dev split is scored after so many steps: at the end of every ``evaluation.every_epochs``, but at the
    end of the run, which the test split tells about, only to find the best."""
    if step == plan.steps(recipe.train.epochs):
        return recipe.train.keep_best is not None
    every, epochs = recipe.evaluation.every_epochs, plan.epoch_of(step)
    return every is not None and plan.steps(epochs) == step and epochs % every == 0


def _complain(telemetry: Telemetry, read_back: ReadBack) -> None:
    for complaint in read_back.wait():
        telemetry.say(f"warning: {complaint}; read back after it was written")


def _seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Distinct for every (seed, step, rank, micro-batch); fixed arithmetic, as Python's tuple hash may change."""
    mixed = seed
    for number in (step, rank):
        mixed = (mixed * 6364136223846793005 + number * 1442695040888963407 + 1) % 2**63
    return (mixed + micro_batch * 2862933555777941757) % 2**63
