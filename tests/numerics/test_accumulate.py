"""Gradients from micro-batches with cached features against one backward pass through everything, dropout on."""

from typing import Any

import pytest
import torch

from sltscale.config import (
    C2RLSettings,
    ResNetSettings,
    SentenceEncoderSettings,
    TransformerSettings,
    TranslationSettings,
    VisualSettings,
)
from sltscale.config import LanguageModelSettings as LanguageModel
from sltscale.engine.accumulate import accumulate
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.models.layers import GlobalBatchNorm
from sltscale.structures import Features, Ragged, TextBatch, VideoBatch

VOCABULARY = Vocabulary(40, 1, 2)
SEEDS = [11, 12, 13]


class PlainEngine:
    """What accumulate needs of an engine, in torch alone."""

    def __init__(self, module: Method) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def method(name: str, norm: str) -> Method:
    tower = TransformerSettings(layers=1, width=24, heads=4, feed_forward=32, dropout=0.3, max_positions=32)
    frames = ResNetSettings(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    visual = VisualSettings(frames=frames, transformer=tower, norm=norm)
    settings: C2RLSettings | TranslationSettings
    if name != "translation":
        sentences = SentenceEncoderSettings(**tower.model_dump())
        settings = C2RLSettings(
            name="c2rl",
            visual=visual,
            text_encoder=sentences,
            text_decoder=tower,
            beta=0.7,
            duplicates="positives" if name == "c2rl, equal sentences" else "negatives",
        )
    else:
        language_model = LanguageModel(
            width=24, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=32, max_positions=32
        )
        settings = TranslationSettings(name="translation", visual=visual, language_model=language_model)
    torch.manual_seed(0)
    return build_method(settings, VOCABULARY).double().train()


def micro_batches() -> list[tuple[VideoBatch, TextBatch]]:
    """Seven clips in parts of 3, 1 and 3, of different lengths."""
    torch.manual_seed(1)
    parts = []
    for lengths, words in (([4, 1, 6], [5, 3, 7]), ([9], [4]), ([2, 5, 3], [8, 3, 6])):
        frames = torch.randint(0, 256, (sum(lengths), 48, 32), dtype=torch.uint8)
        mask = torch.arange(max(words))[None] < torch.tensor(words)[:, None]
        ids = torch.where(mask, torch.randint(3, 40, mask.shape), VOCABULARY.pad_id)
        names = [str(n) for n in lengths]
        said = [str(n % 2) for n in lengths]
        batch = VideoBatch(names, Ragged.from_lengths(frames, lengths), said, ["de"] * len(names))
        parts.append((batch, TextBatch(ids, mask.long())))
    return parts


def at_once(model: Method) -> dict[str, torch.Tensor]:
    """Losses of the whole, with every micro-batch's graph kept until the one backward pass."""
    losses, features = [], []
    for (batch, text), seed in zip(micro_batches(), SEEDS, strict=True):
        torch.manual_seed(seed)
        own, encoded = model(batch, text, encode_only=True)
        losses.append(own)
        features.append(encoded)
    sums = {part: sum(own[part].loss_sum for own in losses) for part in losses[0]}
    counts = {part: sum(own[part].count for own in losses) for part in losses[0]}
    if model.compared:
        for part, output in model.contrast(Features.concatenate(features)).items():
            sums[part], counts[part] = output.loss_sum, output.count
    sum(model.weights[part] * sums[part] / counts[part] for part in sums).backward()
    return {part: (sums[part] / counts[part]).detach() for part in sums}


@pytest.mark.parametrize("norm", ["batch", "layer", "frozen"])
@pytest.mark.parametrize("name", ["c2rl", "c2rl, equal sentences", "translation"])
def test_cached_features_give_the_uncached_gradient_with_dropout(name: str, norm: str) -> None:
    cached, uncached = method(name, norm), method(name, norm)
    outputs = accumulate(PlainEngine(cached), micro_batches(), SEEDS, torch.device("cpu"))
    expected = at_once(uncached)
    assert outputs.keys() == expected.keys() == cached.weights.keys()
    for part, output in outputs.items():
        torch.testing.assert_close(output.loss_sum / output.count, expected[part], rtol=0, atol=1e-12)
    trained = 0
    for (parameter_name, ours), (_, theirs) in zip(cached.named_parameters(), uncached.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), parameter_name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13, msg=parameter_name)
            trained += int(ours.grad.abs().max() > 0)
    assert trained > 20
    for (buffer_name, ours), (_, theirs) in zip(cached.named_buffers(), uncached.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, msg=buffer_name)


def test_batch_norms_count_every_micro_batch_once() -> None:
    model = method("c2rl", "batch")
    accumulate(PlainEngine(model), micro_batches(), SEEDS, torch.device("cpu"))
    norms = [module for module in model.modules() if isinstance(module, GlobalBatchNorm)]
    assert norms
    assert {int(norm.num_batches_tracked) for norm in norms} == {len(SEEDS)}


@pytest.mark.parametrize("name", ["c2rl", "translation"])
def test_counts_are_known_from_the_sentences(name: str) -> None:
    model = method(name, "layer")
    for batch, text in micro_batches():
        losses = model(batch, text)
        counts = model.counts(text)
        assert {part: int(loss.count) for part, loss in losses.items()} == {k: int(v) for k, v in counts.items()}
