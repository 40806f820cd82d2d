"""GFSLT-VLP's loss in groups against a loop, and its sentence noise against the reference's own statistics."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sltscale.data.noise import MASK, mask_words, sentence_generator
from sltscale.losses.contrastive import clip_loss

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/g_gfslt_noise.json").read_text())
DRAWS = 1500
TOLERANCE = 0.06  # four and a half standard deviations of a frequency over 1500 draws


@pytest.mark.parametrize("targets", ["softmax10", "one_hot"])
def test_groups_equal_a_loop_over_them(targets: Any) -> None:
    torch.manual_seed(0)
    groups = torch.tensor([0, 1, 0, 2, 1, 1, 0, 2, 1])
    ids = torch.tensor([0, 0, 0, 3, 4, 0, 6, 3, 8])  # partners are those of the own group
    video, text = (torch.randn(9, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    inputs = (video, text, scale)
    members = [(video[groups == g], text[groups == g], ids[groups == g]) for g in range(3)]
    loops = [clip_loss(v, t, scale, targets=targets, text_ids=own) for v, t, own in members]
    expected = torch.stack([loop.loss_sum for loop in loops]).sum()
    wanted = torch.autograd.grad(expected, inputs)
    for chunk_elements in (2**24, 18):
        options: Any = {"targets": targets, "text_ids": ids, "groups": groups, "chunk_elements": chunk_elements}
        found = clip_loss(video, text, scale, **options)
        torch.testing.assert_close(found.loss_sum, expected, rtol=0, atol=1e-12)
        assert int(found.count) == 9
        for one, other in zip(torch.autograd.grad(found.loss_sum, inputs), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        hits = sum(float(loop.metrics["v2t_accuracy"]) * int(loop.count) for loop in loops)
        assert float(found.metrics["v2t_accuracy"]) == pytest.approx(hits / 9)


def test_ranks_shares_add_up_to_the_whole_in_groups() -> None:
    torch.manual_seed(0)
    groups = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    video, text = torch.randn(2, 8, 6, dtype=torch.float64).unbind()
    options: Any = {"targets": "softmax10", "groups": groups}
    whole = clip_loss(video, text, 5.0, **options)
    parts = [clip_loss(video, text, 5.0, anchors=own, **options) for own in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(parts[0].loss_sum + parts[1].loss_sum, whole.loss_sum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_of_four_starts_near_its_logarithm(dtype: torch.dtype) -> None:
    """GFSLT-VLP's released log begins with 1.3876; ln 4 = 1.3863. Softmax targets cost the entropy of softmax(10 I)."""
    same = torch.ones(16, 8, dtype=dtype)
    loss = clip_loss(same, same, 1 / 0.07, targets="softmax10", groups=torch.arange(16) // 4)
    assert float(loss.loss_sum / loss.count) == pytest.approx(1.3863, abs=3e-3)


@pytest.mark.parametrize("name", list(GOLDEN["cases"]))
def test_noise_has_the_references_statistics(name: str) -> None:
    noise, rate, length = name.rsplit("_", 2)
    count, expected = int(length[1:]), GOLDEN["cases"][name]
    words = [f"w{place}" for place in range(count)]
    rng = np.random.default_rng(0)
    masked, histogram = np.zeros(count), Counter()
    for _ in range(DRAWS):
        found = mask_words(" ".join(words), "de", rng, noise=noise, rate=float(rate[1:])).split(" ")  # type: ignore[arg-type]
        assert len(found) == count and all(word in (MASK, own) for word, own in zip(found, words, strict=True))
        places = np.array([word == MASK for word in found])
        masked += places
        histogram[str(int(places.sum()))] += 1
    assert histogram.keys() <= expected["hist"].keys()
    for number, share in expected["hist"].items():
        assert histogram[number] / DRAWS == pytest.approx(share, abs=TOLERANCE)
    assert masked / DRAWS == pytest.approx(expected["mask_prob_per_position"], abs=TOLERANCE)
    assert ((masked == 0) == (np.array(expected["mask_prob_per_position"]) == 0)).all()


def test_shuffled_half_of_the_time_after_masking() -> None:
    text = " ".join(f"w{place}" for place in range(12))
    rng = np.random.default_rng(0)
    found = [mask_words(text, "de", rng, shuffle=True).split(" ") for _ in range(DRAWS)]
    kept = [[word for word in words if word != MASK] for words in found]
    ordered = [words == sorted(words, key=lambda word: int(word[1:])) for words in kept]
    assert 1 - sum(ordered) / DRAWS == pytest.approx(GOLDEN["shuffled_share"], abs=TOLERANCE)
    assert any(words[0] == MASK for words in found)
    assert not any("w11" in words for words in found)  # the last word was masked before


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("今天很热", "zh", "今天很<mask>"),
        ("今天很热", "zh-CN", "今天很<mask>"),
        ("今 天 很 热", "zh_CN", "今 天 很 <mask>"),
        ("今天很热", "de", "<mask>"),
        ("regen", "de", "<mask>"),
        ("  viel \t regen ", "de", "viel <mask>"),
        ("", "de", ""),
        ("", "zh", ""),
    ],
)
def test_what_a_word_is(text: str, language: str, expected: str) -> None:
    assert mask_words(text, language, np.random.default_rng(0)) == expected


def test_draws_differ_between_clips_steps_and_seeds() -> None:
    draws = {
        float(sentence_generator(seed, step, clip).random())
        for seed in (1, 2)
        for step in (1, 2)
        for clip in ("a", "b")
    }
    assert len(draws) == 8
    assert sentence_generator(1, 2, "ä").random() == sentence_generator(1, 2, "ä").random()
