"""Stored features: their bytes on any number of ranks and after a kill, training on them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import features_worker
import numpy as np
import pytest
import torch
import webdataset
from feature_recipes import FeatureRecipes, on_video, write_feature_recipes
from launching import ROOT, Launcher
from safetensors import safe_open
from safetensors.numpy import load, load_file

from sltscale.config import DataSettings, Recipe
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.splits import open_splits
from sltscale.data.batches.stream import evaluation_batches, stream
from sltscale.data.shards.features import read_tokens
from sltscale.data.shards.index import Index, Row, Shard, open_index, write_index
from sltscale.data.text import build_corpus_tokenizer
from sltscale.diagnosis.examination import examination
from sltscale.diagnosis.finding import Finding
from sltscale.engine.checkpoint import assemble
from sltscale.engine.finished import load_run
from sltscale.engine.manifest import verify
from sltscale.engine.optim import evaluate_frozen, freeze
from sltscale.errors import InputError
from sltscale.evaluation.splits import evaluate_split
from sltscale.extraction import encoder_of_features
from sltscale.methods import export
from sltscale.methods.encoder import build_encoder, encoder_digest, read_encoder
from sltscale.preflight import check_stages, plan_stages
from sltscale.recipe_files import load_recipe, recipe_chain

TRAIN = ROOT / "sltscale/train.py"
WORKER = ROOT / "tests/features_worker.py"
Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def recipes(corpus, tmp_path_factory: pytest.TempPathFactory) -> FeatureRecipes:
    return write_feature_recipes(corpus, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def features(recipes: FeatureRecipes) -> Path:
    """Written by one process."""
    folder = recipes.features.with_name("by_one")
    features_worker.write(recipes.write, folder)
    return folder


@pytest.fixture(scope="module")
def run(recipes: FeatureRecipes, environment: dict[str, str]) -> Path:
    """Translation on features, which are written before: both by two ranks."""
    launcher = Launcher(environment)
    run = recipes.features.parent / "runs/translation"
    try:
        given = ["--recipe", str(recipes.translate), "--run", str(run), "--train.epochs", "1"]
        launcher.check(TRAIN, ["--deepspeed", str(ROOT / "ds_configs/zero2.json"), *given], ranks=2)
    finally:
        launcher.end()
    return run


def shard_bytes(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("*.tar"), *folder.glob("*.safetensors"), *folder.glob("*.report.json")]
    return {path.name: path.read_bytes() for path in files}


def data(recipes: FeatureRecipes, features: Path) -> DataSettings:
    return load_recipe(str(recipes.translate), ["--data.features", str(features), "--data.workers", "0"]).data


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_two_ranks_write_the_bytes_that_one_writes(run: Path, recipes: FeatureRecipes, features: Path) -> None:
    ours, theirs = shard_bytes(recipes.features), shard_bytes(features)
    assert len(ours) == 10 + 3 + 3  # of 51 + 3 + 6 clips, 7 in a shard
    assert ours == theirs


def test_every_clip_once_as_encoded_alone(recipes: FeatureRecipes, features: Path) -> None:
    recipe = load_recipe(str(recipes.write), ["--data.workers", "0"])
    weights = read_encoder(recipes.encoder / "export")
    encoder = build_encoder(recipe.method.visual, weights, "")
    count = 0
    for split, clips in open_splits(recipe.data)[0].items():
        index = open_index(features, split)
        assert index.ids() == clips.indexes[0].ids() and index.texts() == clips.texts()
        assert index.seconds == pytest.approx(clips.indexes[0].seconds)
        alone = evaluation_batches(clips, recipe.data, [[clip] for clip in range(len(clips))])
        for clip, batch in enumerate(alone):
            with torch.inference_mode():
                expected = encoder(batch.frames).values.numpy()
            np.testing.assert_allclose(read_tokens(index, clip), expected, rtol=0, atol=1e-6)
            count += 1
    assert count == 60


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_gone_on_with(
    ranks: int, recipes: FeatureRecipes, features: Path, launcher: Launcher, command: Command, tmp_path: Path
) -> None:
    if ranks == 1:
        assert command(WORKER, recipes.write, tmp_path / "f", "4").returncode == -9
    else:
        killed = launcher.run(WORKER, [str(recipes.write), str(tmp_path / "f"), "2"], ranks=ranks)
        assert killed.returncode != 0
    done = sorted((tmp_path / "f").glob("*.tar"))
    before = {path: path.stat().st_mtime_ns for path in done}
    assert 4 <= len(done) < 10 and not list((tmp_path / "f").glob("*.index.safetensors"))
    done[1].write_bytes(done[1].read_bytes().replace(b"dtype", b"DTYPE"))
    if ranks == 1:
        features_worker.write(recipes.write, tmp_path / "f")
    else:
        assert "writing it again" in launcher.check(WORKER, [str(recipes.write), str(tmp_path / "f")], ranks=ranks)
    assert shard_bytes(tmp_path / "f") == shard_bytes(features)
    assert [path for path in done if path.stat().st_mtime_ns != before[path]] == [done[1]]


def test_half_precision_and_plain_webdataset(recipes: FeatureRecipes, features: Path, tmp_path: Path) -> None:
    text = recipes.write.read_text() + 'dtype = "float16"\n'
    half = recipes.write.with_name("half.toml")
    half.write_text(text)
    features_worker.write(half, tmp_path / "half")
    one, other = open_index(features, "test"), open_index(tmp_path / "half", "test")
    for clip in range(len(one)):
        tokens = read_tokens(other, clip)
        assert tokens.dtype == np.float16
        np.testing.assert_allclose(tokens, read_tokens(one, clip), rtol=1e-3, atol=1e-3)
    tars = [str(path) for path in sorted(features.glob("test-*.tar"))]
    for clip, sample in enumerate(webdataset.WebDataset(tars, shardshuffle=False)):
        facts = json.loads(sample["json"])
        assert facts["text"] == sample["txt"].decode() == one.text(clip)
        assert load(sample["safetensors"])["tokens"].shape == (facts["frames"], 16)
    settings = data(recipes, tmp_path / "half")
    batch = next(evaluation_batches(open_splits(settings)[0]["test"], settings, [[0, 1]]))
    assert batch.frames.values.dtype == torch.float16


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["translate", "retrieve"])
def test_the_losses_are_those_on_the_frozen_encoder(name: str, recipes: FeatureRecipes, features: Path) -> None:
    path = getattr(recipes, name)
    by_tokens = ["--data.global_frames", "200", "--data.bucket_window", "32", "--data.workers", "0"]
    stored = load_recipe(str(path), ["--data.features", str(features), *by_tokens])
    anew = on_video(path, recipes, by_tokens)
    on_stored, on_frozen = losses(stored, recipes), losses(anew, recipes)
    assert on_stored[-1] < on_stored[0] - 0.01
    assert on_stored == pytest.approx(on_frozen, abs=1e-5)


def losses(recipe: Recipe, recipes: FeatureRecipes, steps: int = 12) -> list[float]:
    """Of AdamW's first steps, with dropout."""
    train = open_splits(recipe.data)[0]["train"]
    tokenizer = build_corpus_tokenizer(train.texts(), train.languages(), recipe.text.vocabulary)
    method = export.build(recipe, tokenizer)
    export.transfer(method, recipes.encoder / "export", ("visual",))
    freeze(method, recipe.optim)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    plan = Plan(frames_after_sampling(train.frames, recipe.data), recipe.seed, BatchRule.of(recipe.data))
    found = []
    evaluate_frozen(method.train())
    batches = stream(train, plan, recipe.data, seed=1, rank=0, world_size=1, first_step=0, last_step=steps)
    for step, batch in batches:
        torch.manual_seed(step)
        (output,) = method(batch, tokenizer.encode(batch.texts, batch.languages)).values()
        loss = output.loss_sum / output.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_run_ends_in_a_whole_model(run: Path, recipes: FeatureRecipes, corpus, tmp_path: Path) -> None:
    """It was scored on features; its export and its checkpoint are scored on video, by the encoder in them."""
    scores = json.loads((run / "evaluation/test/metrics.json").read_text())
    with safe_open(run / "export/model.safetensors", framework="pt") as file:
        names = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    assert names == {"visual", "projection", "language_model"}
    trained = assemble(verify(max((run / "checkpoints").glob("step-*"))))
    assert {name.split(".")[0] for name in trained} == {"projection", "language_model"}
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("export"))
    for number, folder in enumerate((run, unfinished)):
        model = load_run(folder, torch.device("cpu"))
        assert model.recipe.data.features is None
        clips = open_splits(model.recipe.data)[0]["test"]
        out = tmp_path / str(number)
        found = evaluate_split(model.method, model.tokenizer, model.recipe, clips, out, torch.device("cpu"))
        assert {**found, "index": scores["index"]} == scores
        theirs = (run / "evaluation/test/hypotheses.tsv").read_text()
        assert (out / "hypotheses.tsv").read_text() == theirs
    assert open_index(recipes.features, "test").digest == scores["index"]


# --- what is bad -----------------------------------------------------------------------------------------------------


def test_a_damaged_part(recipes: FeatureRecipes, features: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    shutil.copytree(features, folder)
    tar = folder / "train-000003.tar"
    index = open_index(folder, "train")
    clip = int(np.flatnonzero(index.shard == 3)[2])
    content = bytearray(tar.read_bytes())
    content[int(index.offset[clip]) + 200] ^= 1
    tar.write_bytes(content)
    with pytest.raises(InputError, match=rf"train-000003.tar, clip {index.key(clip)} .*: safetensors not as indexed"):
        open_splits(data(recipes, folder))
    with pytest.raises(InputError, match=r"is not the one in the index"):
        read_tokens(index, clip)
    tar.unlink()
    with pytest.raises(InputError, match=r"train-000003.tar"):
        open_splits(data(recipes, folder))


def test_features_of_another_encoder(recipes: FeatureRecipes, features: Path, corpus, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipes.translate), ["--data.features", str(features)])
    splits, _ = open_splits(recipe.data)
    assert encoder_of_features(recipe, recipes.encoder / "export", splits)
    other = write_feature_recipes(corpus, tmp_path, seed=6)
    with pytest.raises(InputError, match=r"was made with encoder .*; start from the run that they were made with"):
        encoder_of_features(recipe, other.encoder / "export", splits)
    heads = load_recipe(str(recipes.translate), ["--method.visual.transformer.heads", "4"])
    with pytest.raises(InputError, match=r"was made with encoder"):
        encoder_of_features(heads, recipes.encoder / "export", splits)
    with pytest.raises(InputError, match=r"holds no visual encoder|holds no model.safetensors"):
        encoder_of_features(recipe, tmp_path, splits)
    with pytest.raises(InputError, match=r"split train was begun with encoder '[0-9a-f]{64}', now"):
        features_worker.write(other.write, features)


def test_the_digest_is_of_what_is_computed() -> None:
    recipe = load_recipe("c2rl_features_tiny")
    weights = {"visual.linear.weight": torch.ones(2, 3), "visual.linear.bias": torch.zeros(2)}
    visual = recipe.method.visual

    def digest(**changes: object) -> str:
        return encoder_digest(visual.model_copy(update=changes), weights)

    assert digest() == encoder_digest(visual, dict(reversed(weights.items())))
    assert digest(kernel=5) != digest() != encoder_digest(visual, {**weights, "visual.linear.bias": -torch.zeros(2)})
    assert digest(transformer=visual.transformer.model_copy(update={"checkpoint_activations": True})) == digest()


def test_features_of_other_clips(recipes: FeatureRecipes, features: Path, tmp_path: Path) -> None:
    settings = data(recipes, features)
    other = tmp_path / "other"
    shutil.copytree(settings.shards, other)
    rewrite(open_index(other, "dev"), lambda rows: rows[::-1])
    with pytest.raises(InputError, match=r"dev.index.safetensors holds features of other shards than .*other has now"):
        open_splits(settings.model_copy(update={"shards": str(other)}))
    with pytest.raises(InputError, match=r"was made with data.sampling_rate 0.25, the recipe has 0.5; set it to 0.25"):
        open_splits(settings.model_copy(update={"sampling_rate": 0.5}))
    with pytest.raises(InputError, match="holds video, not features"):
        open_splits(settings.model_copy(update={"features": settings.shards}))
    video = settings.model_copy(update={"features": None})
    for asked, there, message in (
        (settings, video, "holds video, expected is features"),
        (video, settings, "holds features, expected is video"),
    ):
        with pytest.raises(InputError, match=message):
            next(evaluation_batches(open_splits(there)[0]["test"], asked, [[0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "holds features of 2 clips, .* has 3 that they could be of"),
        (lambda rows: [rows[1], rows[0], rows[2]], "clip 0 is .* with [0-9]+ tokens, in .* it is"),
        (lambda rows: [dataclasses.replace(rows[0], frames=1), *rows[1:]], "clip 0 is .* with 1 tokens"),
    ],
)
def test_an_index_that_does_not_hold_every_clip(
    change: Callable[[list[Row]], list[Row]], message: str, recipes: FeatureRecipes, features: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    shutil.copytree(features, folder)
    rewrite(open_index(folder, "dev"), change)
    with pytest.raises(InputError, match=message):
        open_splits(data(recipes, folder))


def rewrite(index: Index, change: Callable[[list[Row]], list[Row]]) -> None:
    rows = []
    for clip in range(len(index)):
        facts = index.row(clip) | {"record": index.record[clip].tolist(), "crc32": index.crc32[clip].tolist()}
        facts = {name: facts[name] for name in (field.name for field in dataclasses.fields(Row))}
        rows.append(Row(**{name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()}))
    shard = Shard(index.shards[0], index.shard_bytes[0], index.shard_sha256[0], change(rows))
    origin = {"corpus": index.corpus, "frame_size": index.frame_size, "features": index.features}
    write_index(Path(index.folder), index.split, [shard], **origin)


def test_settings_that_do_not_go_together(recipes: FeatureRecipes, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="features cannot be written to s3://bucket/f"):
        load_recipe(str(recipes.write), ["--method.folder", "s3://bucket/f"])
    refused = {
        ("--data.augment", "light"): 'augment is "light"; set it to "off"',
        ("--start", "none"): "data.features needs start",
    }
    for overrides, message in refused.items():
        with pytest.raises(InputError, match=message):
            load_recipe(str(recipes.translate), overrides)
    with pytest.raises(InputError, match="for methods translation and retrieval, not c2rl"):
        load_recipe("c2rl_pretrain", ["--data.features", "x", "--data.augment", "off"])
    with pytest.raises(InputError, match=r"has data.features elsewhere, but tiny_features, .*, writes "):
        check(recipes.translate, tmp_path, "--data.features", "elsewhere")
    with pytest.raises(InputError, match=r"takes its encoder from a run; set start"):
        check(recipes.write, tmp_path, "--start", "none")


def check(recipe: Path, folder: Path, *overrides: str) -> None:
    check_stages(plan_stages(recipe_chain(str(recipe), overrides, folder / "run")))


def test_doctor_looks_at_them(recipes: FeatureRecipes, run: Path, corpus, tmp_path: Path) -> None:
    def found(*overrides: str) -> list[Finding]:
        recipe = load_recipe(str(recipes.translate), overrides)
        return [one for one in examination(recipe, tmp_path / "run", None) if one.subject.startswith("features ")]

    assert [(one.state, one.found.split(":")[0]) for one in found()] == [
        ("ok", "train"),
        ("ok", "dev"),
        ("ok", "test"),
    ]
    (absent,) = found("--data.features", str(tmp_path / "none"))
    assert (absent.state, f"not there yet; {recipes.write}, which is run first" in absent.found) == ("ok", True)
    (video,) = found("--data.features", str(corpus.shards))
    assert video.state == "fault" and "holds video, not features" in video.found
    broken = tmp_path / "features"
    shutil.copytree(recipes.features, broken)
    shard = min(broken.glob("dev-*.tar"))
    os.truncate(shard, shard.stat().st_size - 2000)
    states = {one.found.split(":")[0]: one for one in found("--data.features", str(broken))}
    assert {split: one.state for split, one in states.items()} == {"train": "ok", "dev": "fault", "test": "ok"}
    assert shard.name in states["dev"].found


def test_the_commands_say_no_in_one_line(recipes: FeatureRecipes, run: Path, command: Command, tmp_path: Path) -> None:
    given = ("--run", run, "--shards", recipes.features, "--out", tmp_path / "out")
    done = command("-m", "sltscale.cli", "evaluate", *given)
    assert done.returncode == 2 and "holds features, expected is video" in done.stderr.splitlines()[-1]
    verified = command("-m", "sltscale.cli", "shards", "verify", recipes.features)
    assert verified.returncode == 0 and verified.stdout.count("no defects") == 3


@pytest.mark.slow
def test_the_whole_chain_under_zero_3(corpus, recipes: FeatureRecipes, launcher: Launcher, tmp_path: Path) -> None:
    """Pretraining, features and both tasks on them, each starting from the one before; on features the steps are those
    on video with the encoder frozen."""
    made = write_feature_recipes(corpus, tmp_path)
    text = made.write.read_text().replace(f'run = "{made.encoder}"', f'recipe = "{corpus.pretrain}"')
    made.write.write_text(text)
    zero3 = ["--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    for path, name in ((made.retrieve, "retrieval"), (made.translate, "translation")):
        launcher.check(TRAIN, [*zero3, "--recipe", str(path), "--run", str(tmp_path / "runs" / name)], ranks=2)
        metrics = json.loads((tmp_path / "runs" / name / "evaluation/test/metrics.json").read_text())
        assert metrics["clips"] == 6
    anew = ["--data.features", "none", "--start.recipe", "none", "--start.run", str(tmp_path / "runs/tiny_pretrain")]
    anew += ["--optim.groups", '[{part = "visual", frozen = true}]']
    for name, path in (("retrieval", made.retrieve), ("translation", made.translate)):
        run = tmp_path / "runs" / f"{name}_on_video"
        launcher.check(TRAIN, [*zero3, "--recipe", str(path), "--run", str(run), *anew], ranks=2)
        curves = [
            [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
            for folder in (tmp_path / "runs" / name, run)
        ]
        assert len(curves[0]) == 21
        assert curves[0] == pytest.approx(curves[1], abs=1e-5)
        weights = [load_file(folder / "export/model.safetensors") for folder in (tmp_path / "runs" / name, run)]
        assert weights[0].keys() == weights[1].keys()
