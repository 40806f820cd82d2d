"""clip_loss and the chunked losses against reference numbers, obvious forms and each other."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sltscale.losses.contrastive import clcl_loss, clcl_pair_loss, clcl_similarity, clip_loss

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


CASES = {
    # mlfoundations/open_clip@89fb801 src/open_clip/loss.py, one process; float64
    "open_clip": ("a_clip_loss", "", "_ws1", "one_hot"),
    # zhoubenjia/GFSLT-VLP@91ba953 utils.py KLLoss, models.py SLRCLIP; float64
    "gfslt 4": ("b_gfslt_kl_loss", "N4_", "", "softmax10"),
    "gfslt 8": ("b_gfslt_kl_loss", "N8_", "", "softmax10"),
}


@pytest.mark.parametrize("chunk_elements", [1 << 24, 1])
@pytest.mark.parametrize("case", CASES)
def test_clip_loss_reproduces_the_references(case: str, chunk_elements: int) -> None:
    name, prefix, suffix, targets = CASES[case]
    numbers = golden(name)
    video, text = (numbers[f"{prefix}{side}_raw"].clone().requires_grad_() for side in ("image", "text"))
    log_scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    output = clip_loss(video, text, log_scale.exp(), targets=targets, chunk_elements=chunk_elements)
    loss = output.loss_sum / output.count
    found = [loss, *gradients(loss, video, text, log_scale)]
    for key, value in zip(("loss", "grad_image", "grad_text", "grad_log_scale"), found, strict=True):
        torch.testing.assert_close(value, numbers[f"{prefix}{key}{suffix}"], rtol=0, atol=1e-10)


def features(count: int, seed: int = 0, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def test_equal_sentences_are_partners_of_each_other() -> None:
    video, text = features(5)
    ids = torch.tensor([7, 3, 7, 3, 9])
    output = clip_loss(video, text, 10.0, text_ids=ids)
    z = 10 * F.normalize(video, dim=1) @ F.normalize(text, dim=1).T
    expected = torch.zeros((), dtype=torch.float64)
    for logits in (z, z.T):
        for n in range(5):
            partners = [m for m in range(5) if ids[m] == ids[n]]
            expected = expected - sum(logits[n].log_softmax(0)[m] for m in partners) / len(partners) / 2
    torch.testing.assert_close(output.loss_sum, expected, rtol=0, atol=1e-12)
    assert int(output.count) == 5
    alone = clip_loss(video, text, 10.0, text_ids=torch.arange(5))
    torch.testing.assert_close(alone.loss_sum, clip_loss(video, text, 10.0).loss_sum, rtol=0, atol=1e-12)
    # The minimum of a KL divergence is 0, reached where the similarities are the targets.
    same = torch.eye(4, dtype=torch.float64)
    assert float(clip_loss(same, same, 10.0, targets="softmax10").loss_sum.abs()) < 1e-12


@pytest.mark.parametrize("mix", ["sum2", "cico4"])
def test_equal_sentences_are_partners_in_clcl_too(mix: str) -> None:
    v2t, t2v = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids = [7, 3, 7, 3, 9]
    expected = 0.0
    by_mix = {"sum2": [(v2t, 1.0), (t2v.T, 1.0)], "cico4": [(z, 0.25) for z in (v2t, t2v.T, v2t.T, t2v)]}
    for logits, weight in by_mix[mix]:
        for n in range(5):
            partners = [m for m in range(5) if ids[m] == ids[n]]
            expected -= weight * sum(float(logits[n].log_softmax(0)[m]) for m in partners) / len(partners)
    assert float(clcl_loss(v2t, t2v, mix=mix, text_ids=torch.tensor(ids)).loss_sum) == pytest.approx(
        expected, abs=1e-12
    )


def test_accuracy_counts_any_partner() -> None:
    video = torch.eye(3)
    text = torch.eye(3)[[1, 0, 2]]  # the first two are swapped
    assert float(clip_loss(video, text, 5.0).metrics["v2t_accuracy"]) == pytest.approx(1 / 3)
    assert float(clip_loss(video, text, 5.0, text_ids=torch.tensor([1, 1, 2])).metrics["t2v_accuracy"]) == 1


@pytest.mark.parametrize("targets", ["one_hot", "softmax10"])
@pytest.mark.parametrize("chunk_elements", [1, 60, 10**6])
def test_parts_of_the_anchors_add_up_in_value_and_gradient(targets: str, chunk_elements: int) -> None:
    video, text = features(11)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    whole = clip_loss(video, text, scale, targets=targets)
    parts = [
        clip_loss(video, text, scale, targets=targets, anchors=part, chunk_elements=chunk_elements)
        for part in (slice(0, 4), slice(4, 5), slice(5, None))
    ]
    total = sum(part.loss_sum for part in parts)
    assert sum(int(part.count) for part in parts) == 11
    for a, b in zip(
        [total, *gradients(total, video, text, scale)],
        [whole.loss_sum, *gradients(whole.loss_sum, video, text, scale)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask_inner", [True, False])
@pytest.mark.parametrize("mix", ["sum2", "cico4"])
@pytest.mark.parametrize("chunk_elements", [1, 400, 10**6])
@pytest.mark.parametrize("text_ids", [None, torch.tensor([3, 5, 3, 8, 5, 3, 1])], ids=["all differ", "some are equal"])
def test_clcl_in_chunks_equals_the_dense_form(
    mask_inner: bool, mix: str, chunk_elements: int, text_ids: torch.Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(7, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    text = torch.randn(7, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    video_mask = torch.arange(5)[None] < torch.tensor([5, 1, 3, 4, 2, 5, 3])[:, None]
    text_mask = torch.arange(4)[None] < torch.tensor([2, 4, 1, 3, 4, 2, 3])[:, None]
    scale = torch.tensor(11.0, dtype=torch.float64, requires_grad=True)
    similarities = clcl_similarity(video, text, video_mask, text_mask, scale, mask_inner=mask_inner)
    dense = clcl_loss(*similarities, mix=mix, text_ids=text_ids)
    parts = [
        clcl_pair_loss(
            video,
            text,
            video_mask,
            text_mask,
            scale,
            mask_inner=mask_inner,
            mix=mix,
            text_ids=text_ids,
            anchors=anchors,
            chunk_elements=chunk_elements,
        )
        for anchors in (slice(0, 3), slice(3, 7))
    ]
    total = sum(part.loss_sum for part in parts)
    assert sum(int(part.count) for part in parts) == int(dense.count) == 7
    for name in ("v2t_accuracy", "t2v_accuracy"):
        assert sum(float(part.metrics[name]) * int(part.count) for part in parts) / 7 == pytest.approx(
            float(dense.metrics[name])
        )
    for a, b in zip(
        [total, *gradients(total, video, text, scale)],
        [dense.loss_sum, *gradients(dense.loss_sum, video, text, scale)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
