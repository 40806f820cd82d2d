"""The training loop: batch, loss over the global batch, step, and what surrounds it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sltscale import parallel
from sltscale.config import Recipe
from sltscale.data.plan import Plan
from sltscale.data.text import TextTokenizer
from sltscale.engine import checkpoint
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
    evaluate: Callable[[checkpoint.Checkpoint], None],
) -> int:
    """Run from ``first_step`` to the end or to a signal; returns the number of steps done.

    A checkpoint is committed every ``train.checkpoint_every`` steps, at the end, when a signal asked the run to stop,
    and after every ``evaluation.every_epochs``; ``evaluate`` is then called with it on all ranks.
    """
    total_steps = plan.steps(recipe.train.epochs)
    evaluate_every = (recipe.evaluation.every_epochs or recipe.train.epochs + 1) * plan.batches_per_epoch
    engine.train()
    step = saved = first_step
    with StopRequest() as stop:
        waiting = time.perf_counter()
        for number, cpu_batch in batches:
            waited = time.perf_counter() - waiting
            # Random numbers are a function of the step, so that there is no state of theirs to save.
            torch.manual_seed(_seed(recipe.seed, number, parallel.rank()))
            lr = set_learning_rate(engine.optimizer, number, total_steps, recipe.optim)
            batch = cpu_batch.to(device)
            text = tokenizer.encode(batch.texts, batch.languages).to(device)
            outputs: dict[str, LossOutput] = engine(batch, text)
            weights = engine.module.weights
            loss, losses, frames, stopping = global_loss(outputs, weights, batch, stop.received is not None)
            if not math.isfinite(losses["loss"]):
                clips = [clip for ids in parallel.gather_objects(cpu_batch.ids) for clip in ids]
                raise NonFiniteLossError(
                    f"step {number}: loss is {losses['loss']} ({losses}); the checkpoint of step {saved} is kept; "
                    f"clips: {', '.join(clips)}"
                )
            engine.backward(loss)
            engine.step()
            step = number + 1
            clips_done = len(plan.batch(number))
            telemetry.step(number, losses, lr, clips=clips_done, frames=frames, waited=waited)
            if step % recipe.train.log_every == 0 or step == total_steps:
                telemetry.report(step, plan.epoch_of(number), lr)
            evaluating = step % evaluate_every == 0 and step != total_steps
            if stopping or evaluating or step == total_steps or step % recipe.train.checkpoint_every == 0:
                committed = checkpoint.save_checkpoint(engine, folder.checkpoints, step, recipe.train.keep_checkpoints)
                saved = step
                if evaluating and not stopping:
                    evaluate(committed)
            if stopping:
                break
            waiting = time.perf_counter()
    return step


def global_loss(
    outputs: dict[str, LossOutput], weights: dict[str, float], batch: VideoBatch, stop: bool
) -> tuple[Tensor, dict[str, float], int, bool]:
    """(loss to back-propagate on this rank, global means for the log, global frames, whether any rank must stop).

    Each part is a sum over this rank's items; its mean is over the *global* batch, so the sum is divided by the count
    over all ranks. One all-reduce carries all counts, sums and the stop flag.
    """
    names = sorted(outputs)
    metrics = sorted((name, key) for name in names for key in outputs[name].metrics)
    device = outputs[names[0]].loss_sum.device
    tail = [float(batch.frames.values.shape[0]), float(stop)]
    totals = torch.cat(
        [
            torch.stack([outputs[name].loss_sum.detach().double() for name in names]),
            torch.stack([outputs[name].count.detach().double() for name in names]),
            torch.tensor(tail, dtype=torch.float64, device=device),
            *(outputs[name].metrics[key].detach().double().view(1) for name, key in metrics),
        ]
    )
    if parallel.is_distributed():
        dist.all_reduce(totals)
    values = totals.tolist()
    sums, counts = values[: len(names)], values[len(names) : 2 * len(names)]
    frames, stopping, *means = values[2 * len(names) :]
    losses = {name: total / count for name, total, count in zip(names, sums, counts, strict=True)}
    world_size = parallel.world_size()
    # The engine averages gradients over the ranks; the factor world_size undoes that, for the sum is what is meant.
    loss = torch.stack(
        [weights[name] * world_size * outputs[name].loss_sum / count for name, count in zip(names, counts, strict=True)]
    ).sum()
    shown = {"loss": sum(weights[name] * losses[name] for name in names), **losses}
    shown |= {f"{name}_{key}": value / world_size for (name, key), value in zip(metrics, means, strict=True)}
    return loss, shown, round(frames), stopping > 0


def _seed(seed: int, step: int, rank: int) -> int:
    """Distinct for every (seed, step, rank); fixed arithmetic, as Python's tuple hash may change."""
    mixed = seed
    for number in (step, rank):
        mixed = (mixed * 6364136223846793005 + number * 1442695040888963407 + 1) % 2**63
    return mixed
