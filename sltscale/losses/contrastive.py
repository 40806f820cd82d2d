"""Contrastive losses between videos and sentences, as sums and counts over anchors.

Letters: A videos, B sentences, I video tokens, J text tokens, D features, N pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sltscale.structures import LossOutput


def clcl_similarity(
    video: Tensor,
    text: Tensor,
    video_mask: Tensor,
    text_mask: Tensor,
    logit_scale: Tensor | float,
    *,
    temperature: float = 0.07,
    mask_inner: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross-lingual contrastive similarity of token sequences (CiCo, C2RL eq. 1).

    video [A, I, D] and text [B, J, D], any scale (each token is L2-normalised here); masks [A, I] and [B, J], bool or
    int, 1 = valid. logit_scale: the factor itself, already exponentiated. Returns (v2t, t2v), both [A, B], that is
    [video, text], both times logit_scale:

    v2t: each video token takes the softmax-weighted (s / temperature) mean of its cosines s with the sentence's
    tokens; mean over the video's valid tokens. t2v: the same with the roles exchanged, mean over text tokens.

    mask_inner=False lets padding take part in the inner softmax as CiCo's code does; the result then depends on how
    far a batch is padded. Computed in at least float32; memory is a few [A, I, B, J] tensors.
    """
    video_mask, text_mask = video_mask.bool(), text_mask.bool()
    video, text = _unit(video), _unit(text)
    cosine = torch.einsum("aid,bjd->abij", video, text)
    over_text = text_mask[None, :, None, :] if mask_inner else None
    over_video = video_mask[:, None, :, None] if mask_inner else None
    video_best = _soft_maximum(cosine, over_text, temperature, dim=3)  # [A, B, I]
    text_best = _soft_maximum(cosine, over_video, temperature, dim=2)  # [A, B, J]
    v2t = _masked_mean(video_best, video_mask[:, None, :])
    t2v = _masked_mean(text_best, text_mask[None, :, :])
    return logit_scale * v2t, logit_scale * t2v


def clcl_loss(v2t: Tensor, t2v: Tensor, *, mix: Literal["sum2", "cico4"] = "sum2") -> LossOutput:
    """Contrastive loss of N pairs from both similarities, [N, N] each, [video, text], pair n on the diagonal.

    sum2 (C2RL eq. 1): cross-entropy of video anchors by v2t plus that of text anchors by t2v. cico4: the mean of all
    four combinations of similarity and anchor. loss_sum / count is the mean over the N anchors. Metrics:
    v2t_accuracy and t2v_accuracy, the share of anchors whose own partner is the most similar one.
    """
    partners = torch.arange(v2t.shape[0], device=v2t.device)
    video_anchors, text_anchors = _cross_entropy(v2t, partners), _cross_entropy(t2v.T, partners)
    if mix == "sum2":
        loss_sum = video_anchors + text_anchors
    else:
        crossed = _cross_entropy(v2t.T, partners) + _cross_entropy(t2v, partners)
        loss_sum = (video_anchors + text_anchors + crossed) / 4
    with torch.no_grad():
        metrics = {
            "v2t_accuracy": (v2t.argmax(1) == partners).float().mean(),
            "t2v_accuracy": (t2v.argmax(0) == partners).float().mean(),
        }
    return LossOutput(loss_sum, torch.tensor(len(partners), device=v2t.device), metrics)


def _unit(tokens: Tensor) -> Tensor:
    wide = tokens.float() if tokens.dtype in (torch.bfloat16, torch.float16) else tokens
    return F.normalize(wide, dim=-1)


def _soft_maximum(cosine: Tensor, mask: Tensor | None, temperature: float, dim: int) -> Tensor:
    """sum s softmax(s / temperature) along ``dim``; ``mask`` true where an element takes part."""
    scores = cosine / temperature
    if mask is not None:  # the lowest finite number, not -inf: a sequence without valid tokens must not yield NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (cosine * scores.softmax(dim)).sum(dim)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension of the elements where ``mask`` is true; 0 where there are none."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")
