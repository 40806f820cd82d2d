"""Contrastive losses between videos and sentences, as sums and counts over anchors.

Every loss has its dense form and works in chunks of anchors: with gradients enabled, a chunk's similarities are thrown
away after the forward pass and computed once more in the backward pass, so memory grows with the batch, not with its
square. ``anchors`` are the pairs that count; a rank that holds some of the global batch's pairs gives its own ones and
the features of all, and the sums over the ranks are the loss of the whole batch.

Letters: A videos, B sentences, I video tokens, J text tokens, D features, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sltscale.structures import LossOutput

CHUNK_ELEMENTS = 2**24  # similarities that a chunk may hold (64 MiB in float32), though never less than one anchor's


def clip_loss(
    video: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    targets: Literal["one_hot", "softmax10"] = "one_hot",
    text_ids: Tensor | None = None,
    groups: Tensor | None = None,
    anchors: slice = slice(None),
    chunk_elements: int = CHUNK_ELEMENTS,
) -> LossOutput:
    """Symmetric contrastive loss of N pairs (CLIP, arXiv 2103.00020, figure 3).

    video and text [N, D], any scale (L2-normalised here), pair n in row n of both. logit_scale: the factor itself,
    already exponentiated. loss_sum / count is the mean over the anchors of the mean of both directions.

    targets: "one_hot", cross-entropy with the partner; "softmax10", the KL divergence from softmax(10 I), as GFSLT-VLP
    trains (its paper says cross-entropy, arXiv 2307.14768 eq. 3). text_ids [N]: pairs with equal ids are partners of
    each other (they share the target evenly, or the 10s stand at all of them); None = every pair is on its own.
    groups [N]: an anchor's candidates are the pairs of its own group only; None = all pairs.
    Metrics: v2t_accuracy and t2v_accuracy, the share of anchors whose most similar candidate is a partner.
    """
    video, text = _unit(video), _unit(text)
    count = len(video)
    ids = torch.arange(count, device=video.device) if text_ids is None else text_ids
    own = torch.arange(count, device=video.device)[anchors]

    def anchor_losses(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        losses, hits = [], []
        for queries, candidates in ((video, text), (text, video)):
            logits = logit_scale * queries[rows] @ candidates.T
            partners = ids[rows, None] == ids[None]
            if groups is not None:
                others = groups[rows, None] != groups[None]
                logits, partners = logits.masked_fill(others, torch.finfo(logits.dtype).min), partners & ~others
            losses.append(_divergence(logits, partners, targets, None if groups is None else others))
            hits.append(_hits(logits, partners))
        return (losses[0] + losses[1]) / 2, hits[0], hits[1]

    return _sum_in_chunks(anchor_losses, own, 2 * count, chunk_elements)


def clcl_pair_loss(
    video: Tensor,
    text: Tensor,
    video_mask: Tensor,
    text_mask: Tensor,
    logit_scale: Tensor | float,
    *,
    temperature: float = 0.07,
    mask_inner: bool = True,
    mix: Literal["sum2", "cico4"] = "sum2",
    text_ids: Tensor | None = None,
    groups: Tensor | None = None,
    anchors: slice = slice(None),
    chunk_elements: int = CHUNK_ELEMENTS,
) -> LossOutput:
    """``clcl_loss`` of the similarities of N pairs, without ever holding all of them.

    video [N, I, D], text [N, J, D] and the other arguments as ``clcl_similarity`` and ``clcl_loss`` take them;
    text_ids, groups and anchors as ``clip_loss``.
    """
    every = torch.arange(len(video), device=video.device)
    own, ids = every[anchors], every if text_ids is None else text_ids

    def similarity(videos: Tensor | slice, texts: Tensor | slice) -> tuple[Tensor, Tensor]:
        return clcl_similarity(
            video[videos],
            text[texts],
            video_mask[videos],
            text_mask[texts],
            logit_scale,
            temperature=temperature,
            mask_inner=mask_inner,
        )

    def anchor_losses(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        others, partners = None, ids[rows, None] == ids[None]
        if groups is not None:
            others = groups[rows, None] != groups[None]
            partners = partners & ~others

        def candidates(logits: Tensor) -> Tensor:
            return logits if others is None else logits.masked_fill(others, torch.finfo(logits.dtype).min)

        whole = slice(None)
        of_videos = [candidates(logits) for logits in similarity(rows, whole)]
        of_texts = [candidates(logits.T) for logits in similarity(whole, rows)]
        loss = _cross_entropy(of_videos[0], partners) + _cross_entropy(of_texts[1], partners)
        if mix == "cico4":
            loss = (loss + _cross_entropy(of_texts[0], partners) + _cross_entropy(of_videos[1], partners)) / 4
        return loss, _hits(of_videos[0], partners), _hits(of_texts[1], partners)

    elements = len(video) * (video.shape[1] * text.shape[1]) * 2
    return _sum_in_chunks(anchor_losses, own, elements, chunk_elements)


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


def clcl_loss(
    v2t: Tensor, t2v: Tensor, *, mix: Literal["sum2", "cico4"] = "sum2", text_ids: Tensor | None = None
) -> LossOutput:
    """Contrastive loss of N pairs from both similarities, [N, N] each, [video, text], pair n on the diagonal.

    sum2 (C2RL eq. 1): cross-entropy of video anchors by v2t plus that of text anchors by t2v. cico4: the mean of all
    four combinations of similarity and anchor. text_ids: as ``clip_loss``. loss_sum / count is the mean over the N
    anchors. Metrics: v2t_accuracy and t2v_accuracy, the share of anchors whose most similar candidate is a partner.
    """
    ids = torch.arange(v2t.shape[0], device=v2t.device) if text_ids is None else text_ids
    partners = ids[:, None] == ids[None]
    video_anchors, text_anchors = _cross_entropy(v2t, partners), _cross_entropy(t2v.T, partners)
    if mix == "sum2":
        loss_sum = video_anchors + text_anchors
    else:
        crossed = _cross_entropy(v2t.T, partners) + _cross_entropy(t2v, partners)
        loss_sum = (video_anchors + text_anchors + crossed) / 4
    with torch.no_grad():
        metrics = {
            "v2t_accuracy": _hits(v2t, partners) / len(ids),
            "t2v_accuracy": _hits(t2v.T, partners) / len(ids),
        }
    return LossOutput(loss_sum, torch.tensor(len(partners), device=v2t.device), metrics)


def _sum_in_chunks(
    anchor_losses: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], own: Tensor, elements: int, chunk_elements: int
) -> LossOutput:
    """Sum (loss, video anchors that hit, text anchors that hit) over the anchors ``own``; ``elements``: similarities
    that one anchor needs."""
    chunks = own.split(max(1, chunk_elements // max(1, elements)))
    parts = [checkpoint(anchor_losses, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    loss_sum, v2t_hits, t2v_hits = (torch.stack(list(part)).sum() for part in zip(*parts, strict=True))
    metrics = {"v2t_accuracy": v2t_hits.detach() / len(own), "t2v_accuracy": t2v_hits.detach() / len(own)}
    return LossOutput(loss_sum, torch.tensor(len(own), device=own.device), metrics)


def _divergence(
    logits: Tensor, partners: Tensor, targets: Literal["one_hot", "softmax10"], others: Tensor | None
) -> Tensor:
    """Summed over the rows of logits [c, N]; partners and others (who are no candidates) bool [c, N]."""
    if targets == "one_hot":
        return _cross_entropy(logits, partners)
    target = 10 * partners.to(logits.dtype)
    if others is not None:  # the lowest finite number, not -inf: 0 * (-inf - -inf) would be NaN
        target = target.masked_fill(others, torch.finfo(target.dtype).min)
    target = target.log_softmax(1)
    return F.kl_div(logits.log_softmax(1), target, reduction="sum", log_target=True)


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


def _cross_entropy(logits: Tensor, partners: Tensor) -> Tensor:
    """Summed over the rows of logits [c, N], whose partners (bool [c, N]) share the target evenly."""
    target = partners.to(logits.dtype) / partners.sum(1, keepdim=True)
    return F.cross_entropy(logits, target, reduction="sum")


def _hits(logits: Tensor, partners: Tensor) -> Tensor:
    """How many rows of logits [c, N] have a partner as their largest."""
    return partners.gather(1, logits.argmax(1, keepdim=True)).sum()
