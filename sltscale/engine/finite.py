"""Steps whose loss or gradient is not finite: skipped on all ranks, and traced to rank and clips.

A loss that is not finite is back-propagated as NaN (``marked``), so that one test, of the gradient's norm after it was
summed over the ranks, finds both and decides alike everywhere. DeepSpeed makes that test in ZeRO stages 1 to 3 and
leaves weights and optimizer state alone when it fails, without a word; in stage 0, where it does not, a hook on the
optimizer does. Buffers - running statistics - that the forward pass has touched are put back.

To find the culprit the step is taken once more, with the same random numbers, while every module's output and its
gradient are looked at. Ranks run the same modules in the same order, so the rank that meets the first bad number is
the one that brought it in, even if a batch norm or a contrastive loss has handed it on to all of them a moment later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sltscale import parallel
from sltscale.engine.fragments import torch_optimizer
from sltscale.engine.global_loss import Totals
from sltscale.methods.export import persistent_buffers
from sltscale.structures import VideoBatch


class NonFiniteError(RuntimeError):
    """Too many steps in a row were not finite; the message names them and their clips."""


@dataclass(frozen=True)
class Culprit:
    """Where a number that is not finite appeared first on one rank. moment: how many looks came before, the same count
    on all ranks; infinite if all looked well there."""

    rank: int
    moment: float
    where: str
    clips: tuple[str, ...]


def marked(loss: Tensor) -> Tensor:
    """The loss with its gradient unchanged, or NaN as its gradient if it is not finite. No wait for the device."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)


class FiniteSteps:
    """Takes optimizer steps that are finite and skips the others, on all ranks alike; a collective."""

    def __init__(self, engine: Any, max_skipped: int) -> None:
        self.engine = engine
        self.max_skipped = max_skipped
        self._in_a_row: list[str] = []
        self._dropped = False
        self._buffers = list(persistent_buffers(engine.module).values())
        self._before = [buffer.clone() for buffer in self._buffers]
        if engine.zero_optimization_stage() == 0:
            torch_optimizer(engine).register_step_pre_hook(self._drop_bad_gradients)

    def take(self, step: int, batch: VideoBatch, gradients: Callable[[], Totals]) -> tuple[Totals, str | None]:
        """Compute the step's gradients, apply them if they are finite; the totals, and one line if it was skipped.

        gradients: forward and backward passes of the step; called a second time to find out what was wrong. If
        everything is finite then, the step counts. Raises NonFiniteError after ``max_skipped`` in a row.
        """
        self._remember()
        totals = gradients()
        if self._applied():
            self._in_a_row.clear()
            return totals, None
        self._put_back()
        with _watch(self.engine.module, batch) as seen:
            again = gradients()
        if self._applied():
            self._in_a_row.clear()
            return again, f"step {step}: not finite at first, but when repeated; it counts as repeated"
        self._put_back()
        what = "gradient" if math.isfinite(totals.losses["loss"]) else "loss"
        found = parallel.gather_objects(seen.culprit)
        self._in_a_row.append(f"step {step}: {_describe(found)}")
        if len(self._in_a_row) >= self.max_skipped:
            raise NonFiniteError(
                f"{len(self._in_a_row)} steps in a row were not finite (train.max_skipped): {'; '.join(self._in_a_row)}"
            )
        return totals, (
            f"step {step}: the {what} is not finite; {_describe(found)}; skipped on all ranks "
            f"({len(self._in_a_row)} in a row, at {self.max_skipped} the run stops)"
        )

    def _applied(self) -> bool:
        self._dropped = False
        self.engine.step()
        return bool(self.engine.was_step_applied()) and not self._dropped

    def _drop_bad_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before a step in stage 0: without gradients a torch optimizer changes neither weights nor its state."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients or torch.nn.utils.get_total_norm(gradients).isfinite():
            return
        self._dropped = True
        for parameter in parameters:
            parameter.grad = None

    def _remember(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def _put_back(self) -> None:
        if self._buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._buffers, self._before)


class _Seen:
    """What the hooks of one repeated step have seen on this rank. share: its clips."""

    def __init__(self, share: VideoBatch) -> None:
        self.batch = share
        self.moments = itertools.count()
        self.culprit = Culprit(parallel.rank(), math.inf, "", tuple(share.ids))
        self._clips_known = False

    def look(self, tensor: Tensor, where: str, batch: VideoBatch | None) -> None:
        moment = next(self.moments)
        if self._clips_known or not tensor.is_floating_point():
            return
        bad = ~tensor.detach().isfinite()
        if bad.any():
            clips = tuple(self.batch.ids) if batch is None else _clips_of(bad, batch)
            if self.culprit.moment == math.inf:
                self.culprit = Culprit(parallel.rank(), moment, where, clips)
            elif len(clips) < len(self.culprit.clips):
                # A weight's gradient, which tells of no clip, comes before that of the module's input, which does.
                self.culprit = replace(self.culprit, clips=clips)
            self._clips_known = len(self.culprit.clips) < len(self.batch)


@contextmanager
def _watch(module: nn.Module, share: VideoBatch) -> Iterator[_Seen]:
    """While active, every output of a module without submodules is looked at, its gradient, and this rank's own
    gradient of every parameter. The micro-batch at work is the one that ``module`` itself was called with."""
    seen = _Seen(share)

    def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.batch = next((a for a in arguments if isinstance(a, VideoBatch)), share)

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            batch = seen.batch
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, Tensor):
                    seen.look(tensor, f"in the output of {name}", batch)
                    if tensor.requires_grad:
                        tensor.register_hook(lambda g: seen.look(g, f"in the gradient of {name}'s output", batch))

        return after

    hooks = [module.register_forward_pre_hook(enter)]
    for name, part in module.named_modules():
        if not any(True for _ in part.children()):
            hooks.append(part.register_forward_hook(look(name)))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(lambda g, n=name: seen.look(g, f"in the gradient of {n}", None)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _clips_of(bad: Tensor, batch: VideoBatch) -> tuple[str, ...]:
    """Ids of the clips that bad elements belong to: rows are frames, or clips; all of them if they are neither."""
    bad = bad.reshape(len(bad), -1).any(1) if bad.dim() else bad.reshape(1)
    rows = bad.nonzero().flatten().cpu()
    if len(bad) == batch.frames.values.shape[0]:
        rows = torch.searchsorted(batch.frames.cu_seqlens.cpu(), rows.to(torch.int32), right=True) - 1
    elif len(bad) != len(batch):
        return tuple(batch.ids)
    return tuple(batch.ids[row] for row in sorted(set(rows.tolist())))


def _describe(found: list[Culprit]) -> str:
    """The ranks that were first, or all clips if only the loss itself was bad."""
    first = min(culprit.moment for culprit in found)
    culprits = [culprit for culprit in found if culprit.moment == first]
    where = f", first {culprits[0].where}" if culprits[0].where else ""
    parts = [f"rank {culprit.rank}, clips {', '.join(culprit.clips)}" for culprit in culprits]
    return " and ".join(parts) + where
