"""The forecast of activations, against what autograd keeps in a real forward."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sltscale.config import Recipe
from sltscale.engine.optim import evaluate_frozen, freeze
from sltscale.forecast.fitting import with_checkpoints
from sltscale.forecast.trace import Share, saved_bytes, trace
from sltscale.methods.base import Vocabulary, build_method
from sltscale.methods.hfa import HFAPretraining
from sltscale.recipe_files import load_recipe
from sltscale.structures import Ragged, TextBatch, VideoBatch

BOUND = 0.02
SHARE = Share(frames=(21, 40, 33), tokens=(7, 12, 9))
VOCABULARY = Vocabulary(500, 1, 2, 200)
# The published sizes but for depth and pixels: the frame encoders' maps are the bulk in all of them.
RECIPES = {
    "c2rl_pretrain": ["--data.crop_size", "112"],
    "gfslt_vlp_v1": ["--data.crop_size", "112", "--method.text_encoder.layers", "2"],
    "hfa_pretrain": ["--data.crop_size", "112", "--method.language_model.encoder_layers", "2"],
}
TOWERS = ("visual.transformer", "text_encoder", "text_decoder")
SHALLOW = ["--data.crop_size", "32", *(word for tower in TOWERS for word in (f"--method.{tower}.layers", "1"))]
CASES = tuple(itertools.product(RECIPES, ("none", "all")))
ORDINARY = ("hfa_pretrain", "all")  # with towers that are frozen, or but for their adapters


class Lexicon:
    def targets(self, texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), VOCABULARY.pseudo_glosses)


def ready(recipe: Recipe) -> tuple[Any, VideoBatch, TextBatch]:
    torch.manual_seed(0)
    method: Any = build_method(recipe.method, VOCABULARY)
    freeze(method, recipe.optim)
    method.train()
    evaluate_frozen(method)
    if isinstance(method, HFAPretraining):
        method.lexicon = Lexicon()  # type: ignore[assignment]
    size, clips = recipe.data.crop_size, len(SHARE.frames)
    frames = torch.randint(0, 256, (sum(SHARE.frames), size * 3 // 2, size), dtype=torch.uint8)
    video = VideoBatch(["a"] * clips, Ragged.from_lengths(frames, SHARE.frames), [""] * clips, ["de"] * clips)
    lengths = torch.tensor(SHARE.tokens)
    mask = (torch.arange(max(SHARE.tokens)) < lengths[:, None]).long()
    return method, video, TextBatch(torch.where(mask.bool(), 3, 1), mask)


@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        ORDINARY,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case != ORDINARY),
    ],
)
def test_saved_bytes_of_a_real_forward(name: str, checkpoints: str) -> None:
    recipe = with_checkpoints(load_recipe(name, RECIPES[name]), checkpoints)
    forecast, found = trace(recipe, VOCABULARY, SHARE).saved, saved_bytes(*ready(recipe))
    print(f"{name}, checkpoints {checkpoints}: forecast {forecast}, found {found}, off by {forecast / found - 1:+.3%}")
    assert forecast == pytest.approx(found, rel=BOUND)


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operations make and something still holds, and the most of them at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.known = weakref.WeakSet(t.untyped_storage() for t in [*model.parameters(), *model.buffers()])
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.gone, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return out

    def gone(self, size: int) -> None:
        self.bytes -= size


@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        ("c2rl_pretrain", "all"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case != ("c2rl_pretrain", "all")),
    ],
)
def test_peak_of_a_real_step(name: str, checkpoints: str) -> None:
    """Forward and backward with the gradients of parameters kept."""
    recipe = with_checkpoints(load_recipe(name, RECIPES[name]), checkpoints)
    method, video, text = ready(recipe)
    gc.collect()
    with Alive(method) as alive:
        outputs = method(video, text)
        loss = torch.stack([output.loss_sum.reshape(()) for output in outputs.values()]).sum()
        del outputs
        loss.backward()
    FakeTensorMode.cache_clear()
    forecast, found = trace(recipe, VOCABULARY, SHARE), alive.most + video.frames.values.nbytes
    print(f"{name}, checkpoints {checkpoints}: forecast {forecast.peak_with_gradients}, found {found}")
    assert forecast.peak_with_gradients == pytest.approx(found, rel=BOUND)
    assert trace(recipe, VOCABULARY, SHARE) == forecast, "depends on what torch has met before"


def test_ranks_add_what_is_compared_and_halves_halve() -> None:
    recipe = load_recipe("c2rl_pretrain", SHALLOW)
    one = trace(recipe, VOCABULARY, SHARE)
    many = trace(recipe, VOCABULARY, SHARE, world_size=8)
    assert many.contrastive > 4 * one.contrastive
    assert many.saved == pytest.approx(one.saved, rel=0.01)
    half = trace(recipe, VOCABULARY, SHARE, bf16=True)
    assert half.saved < 0.6 * one.saved


def test_micro_batches_keep_the_heaviest_part_only() -> None:
    recipe = load_recipe("c2rl_pretrain", SHALLOW)
    whole = trace(recipe, VOCABULARY, SHARE)
    parts = trace(recipe, VOCABULARY, SHARE, micro_batches=(1, 1, 1))
    heaviest = trace(recipe, VOCABULARY, Share(frames=(40,), tokens=(12,)))
    assert parts.saved == pytest.approx(heaviest.saved, rel=0.02)
    assert parts.peak < whole.peak
    assert parts.contrastive == pytest.approx(whole.contrastive, rel=0.05)
