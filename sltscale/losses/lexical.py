"""Pseudo-glosses: which words of the sentence are signed somewhere in the video, learnt from the sentence alone.

Letters: B videos, M time steps, D features, K pseudo-glosses.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sltscale.structures import LossOutput

SMALLEST = 1e-8  # of a score and of its distance from 1
TEMPERATURES = (0.01, 1.0)


def pseudo_gloss_scores(
    features: Tensor,
    prototypes: Tensor,
    mask: Tensor,
    *,
    tau_prototype: Tensor | float = 0.1,
    tau_time: Tensor | float = 0.1,
    blank: bool = True,
    keep_blank: bool = False,
) -> Tensor:
    """How surely each pseudo-gloss occurs in each video, [B, K] from 0 to 1 (arXiv 2405.04164 section 3.2;
    ryanwongsa/Sign2GPT@5555935 zero_fasttext_prototype_head.py, which HFA took over).

    features [B, M, D] and prototypes [K, D], any scale (L2-normalised here); mask [B, M], bool or int, 1 = valid.
    Cosines become a share of each step that goes to a prototype (softmax over prototypes at ``tau_prototype``) and a
    share of each prototype that falls on a step (softmax over valid steps at ``tau_time``); a score is the sum over
    steps of their product, 0 for a video without valid steps.

    blank: one more prototype, a constant whose cosine with everything is 0, takes the steps that mean nothing. Its
    score is left out, or comes last with keep_blank, [B, K + 1]. Temperatures are used through a clamp to
    ``TEMPERATURES``. Computed in at least float32.
    """
    mask = mask.bool()
    cosine = torch.einsum("bmd,kd->bmk", _unit(features), _unit(prototypes))
    if blank:
        cosine = F.pad(cosine, (0, 1))
    of_step = (cosine / _clamped(tau_prototype)).softmax(2)
    # the lowest finite number, not -inf: a video without valid steps must not yield NaN
    in_time = (cosine / _clamped(tau_time)).masked_fill(~mask[..., None], torch.finfo(cosine.dtype).min).softmax(1)
    scores = (of_step * in_time * mask[..., None]).sum(1)
    return scores[:, : len(prototypes) + (blank and keep_blank)]


def pseudo_gloss_loss(scores: Tensor, targets: Tensor, *, variant: Literal["bce", "bce_logits"] = "bce") -> LossOutput:
    """Binary cross-entropy of scores [B, K] against 0/1 targets [B, K]; loss_sum / count is the mean over all B K.

    variant "bce_logits": HFA's code, which passes the scores through a sigmoid once more. They never leave [0, 1], so
    that the loss stays within a hundredth of ln 2 whatever is learnt; with scores that keep the blank, whose target is
    0, it is the reference's number. Metrics: positive_score and negative_score, the mean of those with target 1 and 0.
    """
    wide = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    wanted = targets.to(wide.dtype)
    if wanted.shape[1] < wide.shape[1]:
        wanted = F.pad(wanted, (0, wide.shape[1] - wanted.shape[1]))
    # 1 - 1e-8 is 1 in float32, where the logarithm of the rest has no end
    bounded = wide.clamp(SMALLEST, 1 - max(SMALLEST, torch.finfo(wide.dtype).eps))
    if variant == "bce":
        loss_sum = -(wanted * bounded.log() + (1 - wanted) * (-bounded).log1p()).sum()
    else:
        loss_sum = F.binary_cross_entropy_with_logits(bounded, wanted, reduction="sum")
    with torch.no_grad():
        metrics = {
            "positive_score": (wide * wanted).sum() / wanted.sum().clamp(min=1),
            "negative_score": (wide * (1 - wanted)).sum() / (1 - wanted).sum().clamp(min=1),
        }
    return LossOutput(loss_sum, torch.tensor(wide.numel(), device=wide.device), metrics)


def _clamped(temperature: Tensor | float) -> Tensor | float:
    low, high = TEMPERATURES
    if isinstance(temperature, Tensor):
        return temperature.clamp(low, high)
    return min(max(temperature, low), high)


def _unit(vectors: Tensor) -> Tensor:
    wide = vectors.float() if vectors.dtype in (torch.bfloat16, torch.float16) else vectors
    return F.normalize(wide, dim=-1)
