"""Weights for exchange: round trip, transfer of parts, and what is refused."""

from pathlib import Path

import pytest
import torch
from tiny_recipes import write_recipes

from sltscale import config
from sltscale.data.text import TextTokenizer, build_corpus_tokenizer
from sltscale.errors import InputError
from sltscale.methods import export
from sltscale.recipe_files import load_recipe


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, config.Recipe]:
    written = write_recipes(tmp_path, tmp_path / "shards")
    return {name: load_recipe(str(getattr(written, name))) for name in ("pretrain", "translate")}


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return build_corpus_tokenizer(["morgen kommt der regen", "heute scheint die sonne"] * 5, ["de"], 60, max_tokens=9)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in export.tensors(module).items()}


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in export.tensors(module).values():
            if tensor.is_floating_point():
                tensor.uniform_(-1, 1)


@pytest.mark.parametrize("name", ["pretrain", "translate"])
def test_round_trip_of_weights_buffers_and_tokenizer(
    name: str, recipes: dict[str, config.Recipe], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    recipe = recipes[name].model_copy(update={"text": config.TextSettings(vocabulary=60, max_tokens=9)})
    method = export.build(recipe, tokenizer)
    randomise(method)
    export.save_export(tmp_path / "export", recipe, state(method), tokenizer)
    loaded = export.load_export(tmp_path / "export")
    assert loaded.recipe == recipe
    assert loaded.tokenizer.max_tokens == 9
    ours, theirs = state(loaded.method), state(method)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_transfer_takes_the_part_and_nothing_else(
    recipes: dict[str, config.Recipe], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    pretrained = export.build(recipes["pretrain"], tokenizer)
    randomise(pretrained)
    export.save_export(tmp_path, recipes["pretrain"], state(pretrained), tokenizer)
    method = export.build(recipes["translate"], tokenizer)
    before, source = state(method), state(pretrained)
    export.transfer(method, tmp_path, ("visual",))
    after = state(method)
    for name, tensor in after.items():
        expected = source[name] if name.startswith("visual.") else before[name]
        assert torch.equal(tensor, expected), name
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_what_does_not_fit_is_named(
    recipes: dict[str, config.Recipe], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    method = export.build(recipes["pretrain"], tokenizer)
    export.save_export(tmp_path, recipes["pretrain"], state(method), tokenizer)
    with pytest.raises(InputError, match="holds no part language_model; it holds"):
        export.transfer(export.build(recipes["translate"], tokenizer), tmp_path, ("language_model",))
    with pytest.raises(InputError, match="the model has no part text_encoder; it has"):
        export.transfer(export.build(recipes["translate"], tokenizer), tmp_path, ("text_encoder",))
    weights = state(method)
    del weights["logit_scale.theta"]
    with pytest.raises(InputError, match=r"logit_scale\.theta"):
        export.load_weights(method, weights, "here")
    with pytest.raises(InputError, match="finish that run first"):
        export.transfer(method, tmp_path / "none", ("visual",))


def test_damaged_files_end_in_one_line(
    recipes: dict[str, config.Recipe], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    method = export.build(recipes["pretrain"], tokenizer)
    export.save_export(tmp_path, recipes["pretrain"], state(method), tokenizer)
    weights = tmp_path / export.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        export.load_export(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        export.transfer(method, tmp_path, ("visual",))
    weights.write_bytes(content)
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        export.load_export(tmp_path)
