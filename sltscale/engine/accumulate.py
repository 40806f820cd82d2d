"""The gradients of one optimizer step from several micro-batches, exact for losses that compare all clips.

Averaging the contrastive losses of micro-batches is not the loss of the whole batch: the negatives of the others are
missing. So features are cached (GradCache, arXiv 2101.06983): every micro-batch is encoded without gradient, the loss
of the global batch is taken of all features together, and its gradient with respect to them is kept; then every
micro-batch is encoded again, with the same random numbers, and back-propagates its features' product with that
gradient along with the losses of its own clips. Normalisers are the counts of the global batch, known from the
sentences beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sltscale import parallel
from sltscale.engine.finite import marked
from sltscale.models.layers import uncounted
from sltscale.structures import Features, LossOutput, TextBatch, VideoBatch

Micro = tuple[VideoBatch, TextBatch]


def accumulate(
    engine: Any, micro_batches: Sequence[Micro], seeds: Sequence[int], device: torch.device
) -> dict[str, LossOutput]:
    """Back-propagate this rank's micro-batches (as many on every rank); ``engine.step`` is then due.

    Each goes to ``device`` when its turn comes. seeds: of the random numbers of each. Returns the parts' losses and
    counts of this rank's whole share, detached.
    """
    method = engine.module
    counts = _global_counts(method, [text for _, text in micro_batches], device)
    scales = {part: weight * parallel.world_size() / counts[part] for part, weight in method.weights.items()}
    contrasted: dict[str, LossOutput] = {}
    gradients: list[dict[str, Tensor]] = [{} for _ in micro_batches]
    if method.compared:
        contrasted, gradients = _cached_gradients(method, _features(engine, micro_batches, seeds, device), scales)
    own: list[dict[str, LossOutput]] = []
    for (batch, text), seed, wanted in zip(micro_batches, seeds, gradients, strict=True):
        torch.manual_seed(seed)
        losses, encoded = engine(batch.to(device), text.to(device), encode_only=True)
        terms = [scales[part] * loss.loss_sum for part, loss in losses.items()]
        tensors = encoded.tensors()
        terms += [(tensors[name] * gradient).sum() for name, gradient in wanted.items()]
        engine.backward(marked(torch.stack([term.reshape(()) for term in terms]).sum()))
        own.append(losses)
    return {**_summed(own), **contrasted}


def _global_counts(method: Any, texts: Sequence[TextBatch], device: torch.device) -> dict[str, Tensor]:
    parts = list(method.weights)
    counts = torch.stack([torch.stack([method.counts(text)[part] for part in parts]) for text in texts])
    counts = counts.sum(0).to(device, torch.float64)
    if parallel.is_distributed():
        dist.all_reduce(counts)
    return dict(zip(parts, counts, strict=True))


def _features(
    engine: Any, micro_batches: Sequence[Micro], seeds: Sequence[int], device: torch.device
) -> list[Features]:
    """Of every micro-batch, without gradient; batch norms count what they see in the pass with gradient."""
    found = []
    with torch.no_grad(), uncounted(engine.module):
        for (batch, text), seed in zip(micro_batches, seeds, strict=True):
            torch.manual_seed(seed)
            _, features = engine(batch.to(device), text.to(device), encode_only=True, features_only=True)
            found.append(features)
    return found


def _cached_gradients(
    method: Any, features: list[Features], scales: dict[str, Tensor]
) -> tuple[dict[str, LossOutput], list[dict[str, Tensor]]]:
    """The contrastive parts, and the gradient of their weighted sum with respect to each micro-batch's features."""
    whole = Features.concatenate(features)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in whole.tensors().items() if _floats(tensor)}
    leafy = Features(
        {name: leaves.get(name, tensor) for name, tensor in whole.rows.items()},
        {name: leaves.get(name, tensor) for name, tensor in whole.shared.items()},
    )
    outputs: dict[str, LossOutput] = method.contrast(leafy)
    total = torch.stack([scales[part] * output.loss_sum for part, output in outputs.items()]).sum()
    of_leaves = dict(zip(leaves, torch.autograd.grad(marked(total), list(leaves.values())), strict=True))
    gradients: list[dict[str, Tensor]] = []
    begin = 0
    for part in features:
        size = len(next(iter(part.rows.values())))
        own = {}
        for name in part.rows.keys() & of_leaves.keys():
            gradient = of_leaves[name][begin : begin + size]
            own[name] = gradient[:, : part.rows[name].shape[1]] if gradient.dim() > 1 else gradient
        gradients.append(own)
        begin += size
    gradients[0] |= {name: of_leaves[name] for name in whole.shared.keys() & of_leaves.keys()}
    detached = {
        part: LossOutput(output.loss_sum.detach(), output.count, output.metrics) for part, output in outputs.items()
    }
    return detached, gradients


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _summed(outputs: list[dict[str, LossOutput]]) -> dict[str, LossOutput]:
    """Sums and counts added up, metrics averaged."""
    summed = {}
    for part in outputs[0]:
        losses = [output[part] for output in outputs]
        metrics = {name: torch.stack([loss.metrics[name] for loss in losses]).mean() for name in losses[0].metrics}
        loss_sum = torch.stack([loss.loss_sum.detach() for loss in losses]).sum()
        summed[part] = LossOutput(
            loss_sum, torch.stack([torch.as_tensor(loss.count) for loss in losses]).sum(), metrics
        )
    return summed
