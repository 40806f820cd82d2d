"""Pseudo-gloss scores and loss against the reference's own numbers, and against obvious loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sltscale.losses.lexical import pseudo_gloss_loss, pseudo_gloss_scores

GOLDEN = Path(__file__).parents[1] / "golden" / "d_sign2gpt_pgp.npz"
PSEUDO_GLOSSES = [[0, 3, 3, 7], [14], [2, 5, 9, 11]]


@pytest.fixture
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=tolerance)


def targets(count: int = 15) -> Tensor:
    wanted = torch.zeros(3, count, dtype=torch.float64)
    for row, numbers in enumerate(PSEUDO_GLOSSES):
        wanted[row, numbers] = 1
    return wanted


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_sign2gpt_scores_loss_and_gradients(golden: dict[str, Tensor], dtype: torch.dtype, tolerance: float) -> None:
    """ryanwongsa/Sign2GPT@5555935 zero_fasttext_prototype_head.py and bce_loss.py, weight 10."""
    names = ("x", "fc_weight", "fc_bias", "prototypes")
    leaves = {name: golden[name].to(dtype).requires_grad_() for name in names}
    temperatures = [torch.full((1,), 0.1, dtype=dtype, requires_grad=True) for _ in range(2)]
    features = leaves["x"] @ leaves["fc_weight"].T + leaves["fc_bias"]
    scores = pseudo_gloss_scores(
        features,
        leaves["prototypes"],
        golden["mask"],
        tau_prototype=temperatures[0],
        tau_time=temperatures[1],
    )
    close(scores, golden["logits"], tolerance)
    loss = pseudo_gloss_loss(scores, targets())
    assert int(loss.count) == 3 * 15
    close(loss.loss_sum / loss.count, golden["bce_mean"], tolerance)
    (10 * loss.loss_sum / loss.count).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        close(leaf.grad, golden[f"grad_{name}"], tolerance)
    for temperature, name in zip(temperatures, ("class", "time"), strict=True):
        assert temperature.grad is not None
        close(temperature.grad, golden[f"grad_{name}_temperature"], tolerance)


def slow_scores(features: Tensor, prototypes: Tensor, lengths: list[int], blank: bool, tau: float, nu: float) -> Tensor:
    scores = torch.zeros(len(lengths), len(prototypes) + blank, dtype=features.dtype)
    for b, length in enumerate(lengths):
        cosine = torch.zeros(length, len(prototypes) + blank, dtype=features.dtype)
        for t in range(length):
            for k in range(len(prototypes)):
                cosine[t, k] = features[b, t] @ prototypes[k] / (features[b, t].norm() * prototypes[k].norm())
        for k in range(cosine.shape[1]):
            for t in range(length):
                share_of_step = (cosine[t, k] / tau).exp() / (cosine[t] / tau).exp().sum()
                share_in_time = (cosine[t, k] / nu).exp() / (cosine[:, k] / nu).exp().sum()
                scores[b, k] += share_of_step * share_in_time
    return scores


@pytest.mark.parametrize("blank", [True, False])
def test_scores_equal_loops(blank: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    prototypes = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    slow = slow_scores(features, prototypes, [5, 2], blank, 0.2, 0.5)
    options = {"tau_prototype": 0.2, "tau_time": 0.5, "blank": blank}
    close(pseudo_gloss_scores(features, prototypes, mask, **options), slow[:, :4], 1e-12)
    close(pseudo_gloss_scores(features, prototypes, mask, **options, keep_blank=True), slow, 1e-12)


def test_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    wanted = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    results = []
    values = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    for extra in (0, 7):
        junk = torch.full((2, extra, 6), 3.0, dtype=torch.float64)
        features = torch.cat([values, junk], 1).requires_grad_()
        mask = torch.arange(5 + extra)[None] < torch.tensor([5, 3])[:, None]
        scores = pseudo_gloss_scores(features, prototypes, mask)
        pseudo_gloss_loss(scores, wanted).loss_sum.backward()
        assert features.grad is not None
        assert not features.grad[~mask].any()
        results.append((scores.detach(), features.grad[mask]))
    for one, other in zip(*results, strict=True):
        close(other, one, 1e-12)


def test_a_video_without_steps_has_scores_of_0() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    features = torch.randn(2, 2, 3, requires_grad=True)
    scores = pseudo_gloss_scores(features, torch.randn(4, 3), mask)
    assert scores[1].tolist() == [0, 0, 0, 0] and (scores[0] > 0).all()
    loss = pseudo_gloss_loss(scores, torch.zeros(2, 4)).loss_sum
    loss.backward()
    assert loss.isfinite() and features.grad is not None and features.grad.isfinite().all()


def test_temperatures_are_clamped() -> None:
    features, prototypes, mask = torch.randn(2, 3, 4), torch.randn(5, 4), torch.ones(2, 3)
    for found, used in ((0.001, 0.01), (7.0, 1.0)):
        one = pseudo_gloss_scores(features, prototypes, mask, tau_prototype=found, tau_time=torch.tensor([found]))
        other = pseudo_gloss_scores(features, prototypes, mask, tau_prototype=used, tau_time=used)
        close(one, other, 0)


def test_binary_cross_entropy_by_hand() -> None:
    loss = pseudo_gloss_loss(torch.tensor([[0.9, 0.2], [0.5, 0.1]]), torch.tensor([[1, 0], [0, 1]]))
    assert loss.loss_sum.item() == pytest.approx(-math.log(0.9 * 0.8 * 0.5 * 0.1), rel=1e-6)
    assert int(loss.count) == 4
    assert loss.metrics["positive_score"].item() == pytest.approx(0.5)
    assert loss.metrics["negative_score"].item() == pytest.approx(0.35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_at_the_ends_have_finite_losses_and_gradients(dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=dtype, requires_grad=True)
    loss = pseudo_gloss_loss(scores, torch.tensor([[1, 0, 0, 1]])).loss_sum
    loss.backward()
    assert 20 < loss.item() < 40
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_the_references_variant_hardly_knows_right_from_wrong() -> None:
    """A sigmoid on top of scores, blank included: ln 2 where all are 0, 0.69217 for a perfect prediction of 6 in 2322.
    The default's loss of a perfect prediction is 0."""
    wanted = torch.zeros(1, 2322, dtype=torch.float64)
    wanted[0, :6] = 1
    for scores, expected in ((torch.zeros(1, 2323), 0.69315), (torch.cat([wanted, torch.zeros(1, 1)], 1), 0.69217)):
        loss = pseudo_gloss_loss(scores.double(), wanted, variant="bce_logits")
        assert int(loss.count) == 2323
        assert (loss.loss_sum / loss.count).item() == pytest.approx(expected, abs=2e-5)
    perfect = pseudo_gloss_loss(wanted, wanted)
    assert (perfect.loss_sum / perfect.count).item() < 1e-7
