"""The losses against obvious loops, against torch, and against CiCo's own numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sltscale.losses.contrastive import clcl_loss, clcl_similarity
from sltscale.losses.seq2seq import label_smoothed_cross_entropy

GOLDEN = Path(__file__).parents[1] / "golden" / "c_cico_clcl.npz"


@pytest.fixture
def golden() -> dict[str, Tensor]:
    """FangyunWei/SLRT@38a4f7b CiCo/CLCL/modules/modeling.py, float64; its video mask is inverted (1 = padding)."""
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def random_tokens(
    count: int, length: int, width: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, length, width, generator=generator, dtype=dtype)
    lengths = torch.randint(1, length + 1, (count,), generator=generator)
    lengths[0] = length
    return tokens, torch.arange(length)[None] < lengths[:, None]


def slow_clcl(
    video: Tensor, text: Tensor, video_mask: Tensor, text_mask: Tensor, scale: float, mask_inner: bool
) -> tuple[Tensor, Tensor]:
    """methods.md C3, word by word."""
    v2t, t2v = torch.zeros(len(video), len(text)).to(video), torch.zeros(len(video), len(text)).to(video)
    for a in range(len(video)):
        for b in range(len(text)):
            steps = [i for i in range(video.shape[1]) if video_mask[a, i]]
            tokens = [j for j in range(text.shape[1]) if text_mask[b, j]]
            inner_steps = steps if mask_inner else range(video.shape[1])
            inner_tokens = tokens if mask_inner else range(text.shape[1])

            def cosine(i: int, j: int, a: int = a, b: int = b) -> Tensor:
                return F.cosine_similarity(video[a, i], text[b, j], dim=0)

            for i in steps:
                s = torch.stack([cosine(i, j) for j in inner_tokens])
                v2t[a, b] += scale * (s * (s / 0.07).softmax(0)).sum() / len(steps)
            for j in tokens:
                s = torch.stack([cosine(i, j) for i in inner_steps])
                t2v[a, b] += scale * (s * (s / 0.07).softmax(0)).sum() / len(tokens)
    return v2t, t2v


@pytest.mark.parametrize("mask_inner", [True, False])
def test_clcl_equals_the_obvious_loop(mask_inner: bool) -> None:
    video, video_mask = random_tokens(3, 5, 8, seed=0)
    text, text_mask = random_tokens(4, 6, 8, seed=1)
    ours = clcl_similarity(video, text, video_mask, text_mask.long(), 10.0, mask_inner=mask_inner)
    slow = slow_clcl(video, text, video_mask, text_mask, 10.0, mask_inner)
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("mix", "name", "factor"), [("cico4", "balance05", 1.0), ("sum2", "dual1", 2.0)])
def test_clcl_reproduces_cico(golden: dict[str, Tensor], mix: str, name: str, factor: float) -> None:
    video, text, text_aug = (golden[n].clone().requires_grad_() for n in ("video", "text", "text_aug"))
    log_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    video_mask = golden["video_mask"] == 0
    scale = log_scale.exp()
    v2t, _ = clcl_similarity(video, text, video_mask, golden["text_mask"], scale, mask_inner=False)
    _, t2v = clcl_similarity(video, text_aug, video_mask, golden["text_aug_mask"], scale, mask_inner=False)
    loss = clcl_loss(v2t, t2v, mix=mix)
    (loss.loss_sum / loss.count).backward()
    found = {
        "I2T_sim": v2t,
        "T2I_sim": t2v,
        f"{name}_loss": loss.loss_sum / loss.count / factor,
        f"{name}_grad_video": video.grad / factor,
        f"{name}_grad_text": text.grad / factor,
        f"{name}_grad_text_aug": text_aug.grad / factor,
        f"{name}_grad_log_scale": log_scale.grad / factor,
    }
    for key, value in found.items():
        torch.testing.assert_close(value, golden[key], rtol=0, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_clcl_reproduces_cicos_evaluation_and_the_masked_variant(golden: dict[str, Tensor]) -> None:
    masks = golden["video_mask"] == 0, golden["text_mask"]
    faithful = clcl_similarity(golden["video"], golden["text"], *masks, 1 / 0.07, mask_inner=False)
    torch.testing.assert_close((faithful[0] + faithful[1]) / 2, golden["eval_mixed_sim"], rtol=0, atol=1e-9)
    masked = clcl_similarity(golden["video"], golden["text"], *masks, 1 / 0.07)
    torch.testing.assert_close(masked[0], golden["masked_variant_I2T_sim"], rtol=0, atol=1e-9)
    torch.testing.assert_close(masked[1], golden["masked_variant_T2I_sim"], rtol=0, atol=1e-9)


def test_clcl_of_one_token_and_one_step_is_the_cosine() -> None:
    video, text = torch.randn(3, 1, 16), torch.randn(5, 1, 16)
    ones = torch.ones(3, 1, dtype=torch.bool), torch.ones(5, 1, dtype=torch.bool)
    expected = 7 * F.cosine_similarity(video[:, None, 0], text[None, :, 0], dim=-1)
    for similarity in clcl_similarity(video, text, *ones, 7.0):
        torch.testing.assert_close(similarity, expected)


@pytest.mark.parametrize("mask_inner", [True, False])
def test_extra_padding_changes_only_the_unmasked_similarity(mask_inner: bool) -> None:
    video, video_mask = random_tokens(3, 5, 8, seed=2)
    text, text_mask = random_tokens(3, 4, 8, seed=3)
    results = []
    for extra in (0, 3):
        v, t = video.clone().requires_grad_(), text.clone().requires_grad_()
        padding = torch.randn(3, extra, 8, dtype=torch.float64)
        false = torch.zeros(3, extra, dtype=torch.bool)
        sims = clcl_similarity(
            torch.cat([v, padding], 1),
            torch.cat([t, padding], 1),
            torch.cat([video_mask, false], 1),
            torch.cat([text_mask, false], 1),
            10.0,
            mask_inner=mask_inner,
        )
        clcl_loss(*sims).loss_sum.backward()
        results.append([*sims, v.grad, t.grad])
    differences = [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
    if mask_inner:
        assert max(differences) < 1e-12
    else:
        assert min(differences) > 1e-6


def test_clcl_of_a_sequence_without_valid_tokens_is_zero_not_nan() -> None:
    video, video_mask = random_tokens(2, 3, 4, seed=0)
    text, text_mask = random_tokens(2, 3, 4, seed=1)
    text_mask[1] = False
    video.requires_grad_()
    v2t, t2v = clcl_similarity(video, text, video_mask, text_mask, 1.0)
    (v2t.sum() + t2v.sum()).backward()
    assert t2v[:, 1].abs().max() == 0
    assert torch.isfinite(v2t).all() and torch.isfinite(video.grad).all()


def test_clcl_of_bfloat16_tokens_is_computed_in_float32() -> None:
    video, video_mask = random_tokens(3, 5, 8, seed=0, dtype=torch.bfloat16)
    text, text_mask = random_tokens(3, 4, 8, seed=1, dtype=torch.bfloat16)
    ours = clcl_similarity(video, text, video_mask, text_mask, 10.0)
    wide = clcl_similarity(video.float(), text.float(), video_mask, text_mask, 10.0)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours, wide, rtol=0, atol=0)


@pytest.mark.parametrize(("mix", "directions"), [("sum2", 2), ("cico4", 1)])
def test_contrastive_loss_of_equal_similarities_is_ln_n_and_counts_anchors(mix: str, directions: int) -> None:
    flat = torch.zeros(8, 8)
    loss = clcl_loss(flat, flat, mix=mix)
    assert int(loss.count) == 8
    assert float(loss.loss_sum / loss.count) == pytest.approx(directions * math.log(8), rel=1e-6)


def test_contrastive_accuracies_follow_their_direction() -> None:
    v2t = torch.eye(3) * 5  # every video finds its sentence
    t2v = torch.tensor([[9.0, 9, 0], [0, 1, 0], [0, 0, 9]])  # sentence 1 finds video 0
    metrics = clcl_loss(v2t, t2v).metrics
    assert float(metrics["v2t_accuracy"]) == 1
    assert float(metrics["t2v_accuracy"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_equals_the_formula(smoothing: float) -> None:
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100], [6, -100, -100, -100]])
    loss = label_smoothed_cross_entropy(logits, labels, smoothing)
    expected = torch.zeros((), dtype=torch.float64)
    for b, t in ((0, 0), (0, 1), (0, 2), (1, 0)):
        log_p = logits[b, t] - logits[b, t].exp().sum().log()
        expected = expected - (1 - smoothing) * log_p[labels[b, t]] - smoothing * log_p.mean()
    torch.testing.assert_close(loss.loss_sum, expected, rtol=0, atol=1e-12)
    assert int(loss.count) == 4
    (ours,) = torch.autograd.grad(loss.loss_sum, logits)
    (theirs,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert ours[0, 3].abs().max() == 0


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits, labels = torch.randn(3, 5, 50).bfloat16(), torch.randint(0, 50, (3, 5))
    ours = label_smoothed_cross_entropy(logits, labels, 0.2).loss_sum
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, label_smoothed_cross_entropy(logits.float(), labels, 0.2).loss_sum)


def test_token_accuracy_and_a_share_without_tokens() -> None:
    logits = F.one_hot(torch.tensor([[1, 2, 0]]), 3).float() * 4
    accuracy = label_smoothed_cross_entropy(logits, torch.tensor([[1, 0, -100]]), 0.0).metrics["token_accuracy"]
    assert float(accuracy) == 0.5
    empty = label_smoothed_cross_entropy(logits, torch.full((1, 3), -100), 0.2)
    assert float(empty.loss_sum) == 0 and int(empty.count) == 0 and float(empty.metrics["token_accuracy"]) == 0


def test_sums_and_counts_of_parts_add_up_to_the_whole() -> None:
    logits, labels = torch.randn(4, 5, 9, dtype=torch.float64), torch.randint(0, 9, (4, 5))
    labels[0, 2:] = -100
    whole = label_smoothed_cross_entropy(logits, labels, 0.1)
    parts = [label_smoothed_cross_entropy(logits[s], labels[s], 0.1) for s in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(p.loss_sum for p in parts), whole.loss_sum)
    assert sum(int(p.count) for p in parts) == int(whole.count) == 17
