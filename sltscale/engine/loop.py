"""The training loop: batch, loss over the global batch, step, and what surrounds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sltscale import parallel
from sltscale.config import Recipe
from sltscale.data.batches.plan import Plan
from sltscale.data.text import TextTokenizer
from sltscale.engine import checkpoint
from sltscale.engine.global_loss import global_loss
from sltscale.engine.optim import set_learning_rate
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.signals import StopRequest
from sltscale.engine.telemetry import Telemetry
from sltscale.structures import LossOutput, VideoBatch


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite; the message names step and clips."""


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
    seconds_before: float,
    evaluate: Callable[[checkpoint.Checkpoint], None],
) -> int:
    """Run from ``first_step`` to the end or to a signal; returns the number of steps done.

    A checkpoint is committed every ``train.checkpoint_every`` steps, at the end, when a signal asked the run to stop,
    and after every ``evaluation.every_epochs``; ``evaluate`` is then called with it on all ranks. seconds_before: what
    earlier attempts and the preparation took.
    """
    total_steps = plan.steps(recipe.train.epochs)
    engine.train()
    step = saved = first_step
    started = waiting = time.perf_counter()
    for number, cpu_batch in batches:
        waited = time.perf_counter() - waiting
        # Random numbers are a function of the step, so that there is no state of theirs to save.
        torch.manual_seed(_seed(recipe.seed, number, parallel.rank()))
        lr = set_learning_rate(engine.optimizer, number, total_steps, recipe.optim)
        batch = cpu_batch.to(device)
        text = tokenizer.encode(batch.texts, batch.languages).to(device)
        outputs: dict[str, LossOutput] = engine(batch, text)
        loss, totals = global_loss(outputs, engine.module.weights, batch, stop.received is not None)
        if not math.isfinite(totals.losses["loss"]):
            clips = [clip for ids in parallel.gather_objects(cpu_batch.ids) for clip in ids]
            raise NonFiniteLossError(
                f"step {number}: the loss is not finite ({totals.losses}); the checkpoint of step {saved} is kept; "
                f"clips: {', '.join(clips)}"
            )
        engine.backward(loss)
        engine.step()
        step = number + 1
        telemetry.step(number, totals, lr, clips=len(plan.batch(number)), waited=waited)
        if step % recipe.train.log_every == 0 or step == total_steps:
            telemetry.report(step, plan.epoch_of(number), lr)
        evaluating = step != total_steps and _ends_evaluated_epoch(plan, step, recipe.evaluation.every_epochs)
        if totals.stop or evaluating or step == total_steps or step % recipe.train.checkpoint_every == 0:
            paused = time.perf_counter()
            keep = recipe.train.keep_checkpoints
            committed = checkpoint.save_checkpoint(engine, folder.checkpoints, step, keep, plan.state(step))
            saved = step
            if parallel.rank() == 0:
                folder.set_status("running", step=step, seconds=seconds_before + paused - started)
            if evaluating and not totals.stop:
                evaluate(committed)
            telemetry.exclude(time.perf_counter() - paused)
        if totals.stop:
            break
        waiting = time.perf_counter()
    return step


def _ends_evaluated_epoch(plan: Plan, step: int, every: int | None) -> bool:
    epochs = plan.epoch_of(step)
    return every is not None and plan.steps(epochs) == step and epochs % every == 0


def _seed(seed: int, step: int, rank: int) -> int:
    """Distinct for every (seed, step, rank); fixed arithmetic, as Python's tuple hash may change."""
    mixed = seed
    for number in (step, rank):
        mixed = (mixed * 6364136223846793005 + number * 1442695040888963407 + 1) % 2**63
    return mixed
