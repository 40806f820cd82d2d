"""What a step's activations take, from running the method's own forward and backward without memory or arithmetic.

Autograd is the real one, so what it keeps is what it keeps in training, checkpointed blocks and frozen towers included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sltscale.config import MethodSettings, Recipe
from sltscale.engine.optim import evaluate_frozen, freeze
from sltscale.forecast.shapes import Saved, Shapes, fused_kernels
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.methods.hfa import HFAPretraining
from sltscale.structures import Features, LossOutput, Ragged, TextBatch, VideoBatch


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch. frames, tokens: of each clip, after sampling, </s> and code included."""

    frames: tuple[int, ...]
    tokens: tuple[int, ...]

    def parts(self, sizes: Sequence[int]) -> list[Share]:
        """Consecutive parts of so many clips each."""
        found, begin = [], 0
        for size in sizes:
            found.append(Share(self.frames[begin : begin + size], self.tokens[begin : begin + size]))
            begin += size
        return found


@dataclass(frozen=True)
class Activations:
    """saved: bytes that autograd keeps for the backward, each storage once, parameters and buffers left out.
    contrastive: most bytes that comparing clips takes beside this rank's features: the other ranks', similarities, and
    gradients of both. peak: most bytes alive at a time in forward and backward beside the model, gradients of
    parameters left out or, in peak_with_gradients, kept from when they appear. flops: of forward and backward, a
    multiplication and an addition being two."""

    saved: int
    contrastive: int
    peak: int
    peak_with_gradients: int
    flops: int


def trace(
    recipe: Recipe,
    vocabulary: Vocabulary,
    share: Share,
    *,
    world_size: int = 1,
    bf16: bool = False,
    micro_batches: Sequence[int] | None = None,
    fused: bool = False,
) -> Activations:
    """Of a step in which every rank has such a share. micro_batches: clips of each of its parts, None for one step at
    once. fused: as CUDA's kernels keep things (dropout a byte for each element, attention no weights), instead of as
    the CPU's."""
    with _ranks(world_size), Shapes() as shapes, fused_kernels() if fused else nullcontext():
        method = build_without_memory(recipe.method, vocabulary, stored_tokens=recipe.data.features is not None)
        shapes.take_in(method, bf16)
        freeze(method, recipe.optim)
        method.train()
        evaluate_frozen(method)
        if isinstance(method, HFAPretraining):
            method.lexicon = _AnyLexicon(vocabulary.pseudo_glosses)  # type: ignore[assignment]
        width = token_width(recipe)
        frame = _pixels(recipe.data.crop_size) if width is None else torch.empty(width, device="meta")
        if micro_batches is None:
            return _whole(method, shapes, _batch(shapes, share, frame), _text(share))
        return _in_parts(method, shapes, share.parts(micro_batches), frame)


def build_without_memory(settings: MethodSettings, vocabulary: Vocabulary, *, stored_tokens: bool = False) -> Method:
    with torch.device("meta"):
        return build_method(settings, vocabulary, stored_tokens=stored_tokens)


def token_width(recipe: Recipe) -> int | None:
    """Of the stored visual tokens that the recipe reads; None if it reads video."""
    return recipe.method.visual.transformer.width if recipe.data.features is not None else None  # type: ignore[union-attr]


def _whole(method: Method, shapes: Shapes, batch: VideoBatch, text: TextBatch) -> Activations:
    with torch.no_grad():
        features = method.encode(batch, text, features_only=True)[1]
    contrastive = _compare(method, shapes, features)
    del features
    saved = Saved(method)
    shapes.restart(besides=batch.frames.values)
    with _gradients_let_go(method, shapes):
        with saved.counting():
            outputs = method(batch, text)
        kept = saved.bytes
        loss = _total(method, outputs)
        del outputs
        loss.backward()
    return Activations(kept, contrastive, shapes.peak, shapes.peak_with_gradients, shapes.flops)


def _in_parts(method: Method, shapes: Shapes, parts: Sequence[Share], frame: Tensor) -> Activations:
    """As ``engine.accumulate``: features of all parts without gradient, their comparison, each part once more."""
    saved = contrastive = 0
    shapes.restart()
    batches = [(_batch(shapes, part, frame), _text(part)) for part in parts]
    with torch.no_grad():
        found = [method.encode(batch, text, features_only=True)[1] for batch, text in batches]
    whole = Features.concatenate(found)
    contrastive = _compare(method, shapes, whole)
    del found
    with _gradients_let_go(method, shapes):
        for batch, text in batches:
            counted = Saved(method)
            with counted.counting():
                losses, features = method.encode(batch, text, features_only=False)
            saved = max(saved, counted.bytes)
            terms = [tensor.sum() for tensor in features.tensors().values() if tensor.requires_grad]
            loss = torch.stack([*terms, *([_total(method, losses)] if losses else [])]).sum()
            del losses, features, terms
            loss.backward()
            del loss
    return Activations(saved, contrastive, shapes.peak, shapes.peak_with_gradients, shapes.flops)


def _compare(method: Method, shapes: Shapes, features: Features) -> int:
    """The most bytes that ``contrast`` and its backward take beside these features."""
    if not method.compared:
        return 0
    floats = {name: t.detach().requires_grad_() for name, t in features.tensors().items() if t.is_floating_point()}
    rows, shared = ({n: floats.get(n, t) for n, t in own.items()} for own in (features.rows, features.shared))
    with shapes.apart() as peak:
        _total(method, method.contrast(Features(rows, shared))).backward()
    return peak()


def _total(method: Method, losses: dict[str, LossOutput]) -> Tensor:
    terms = [(method.weights[part] * loss.loss_sum).reshape(()) for part, loss in losses.items()]
    return torch.stack(terms).sum()


def saved_bytes(method: Method, batch: VideoBatch, text: TextBatch) -> int:
    """What autograd keeps of a real forward: what ``trace`` predicts, found by the same hooks."""
    saved = Saved(method)
    with saved.counting():
        outputs = method(batch, text)
    kept = saved.bytes
    del outputs
    return kept


class _AnyLexicon:
    """Targets of the right shape."""

    def __init__(self, pseudo_glosses: int) -> None:
        self.pseudo_glosses = pseudo_glosses

    def targets(self, texts: Sequence[str]) -> Tensor:
        return torch.zeros(len(texts), self.pseudo_glosses)


@contextmanager
def _ranks(world_size: int) -> Iterator[None]:
    """A process group in which all ranks are as this one, and nothing is sent."""
    if world_size == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _gradients_let_go(method: Method, shapes: Shapes) -> Iterator[None]:
    known: set[Tensor] = set()

    def let_go(parameter: Tensor) -> None:
        shapes.gradients += 0 if parameter in known else parameter.nbytes
        known.add(parameter)
        parameter.grad = None

    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(let_go) for parameter in trained]
    yield
    for handle in handles:
        handle.remove()


def _pixels(size: int) -> Tensor:
    return torch.empty(size * 3 // 2, size, dtype=torch.uint8, device="meta")


def _batch(shapes: Shapes, share: Share, frame: Tensor) -> VideoBatch:
    """frame: one of its frames."""
    frames = shapes.fake(frame.new_empty(sum(share.frames), *frame.shape))
    clips = [str(number) for number in range(len(share.frames))]
    return VideoBatch(clips, Ragged.from_lengths(frames, share.frames), [""] * len(clips), [""] * len(clips))


def _text(share: Share) -> TextBatch:
    """Token ids of those numbers; the masked sentences of a method that reads them are as long."""
    lengths = torch.tensor(share.tokens)
    mask = (torch.arange(max(share.tokens))[None] < lengths[:, None]).long()
    text = TextBatch(torch.where(mask.bool(), 3, 1), mask)
    return dataclasses.replace(text, masked=text)
