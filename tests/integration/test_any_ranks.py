"""The same recipe and command on 1 to 4 ranks at any ZeRO stage: the same steps, wherever a run goes on, and the same
translations. Minutes long; multiprocess/test_same_update.py and test_checkpoints.py hold the short forms."""

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, Launcher
from tiny_recipes import TRANSLATE, Corpus

from sltscale import config
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import stream
from sltscale.data.shards.index import open_index
from sltscale.engine.manifest import read_manifest

TRAIN = ROOT / "sltscale/train.py"
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(3600)]
# Every rank draws its own dropout masks.
TOWERS = ("visual.transformer", "text_encoder", "text_decoder")
WITHOUT_DROPOUT = [word for tower in TOWERS for word in (f"--method.{tower}.dropout", "0")]
STOP_AT, END = 10, 20
START = '[start]\nrecipe = "{folder}/pretrain.toml"\n'


def train(launcher: Launcher, recipe: Path, run: Path, ranks: int, stage: int, *options: str) -> str:
    settings = ROOT / f"ds_configs/zero{stage}.json"
    arguments = ["--deepspeed", str(settings), "--recipe", str(recipe), "--run", str(run), *options]
    return launcher.check(TRAIN, arguments, ranks=ranks, seconds=600)


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def assert_same_curve(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """The largest relative difference of a loss."""
    assert [(r["step"], r["clips"], r["frames"]) for r in found] == [
        (r["step"], r["clips"], r["frames"]) for r in expected
    ]
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        for part in ("loss", "contrastive", "lm"):
            worst = max(worst, abs(ours[part] / theirs[part] - 1))
    assert worst <= 1e-4, f"{worst:.1e}"
    return worst


def clips_of_steps(run: Path, ranks: int, first: int, last: int) -> list[set[str]]:
    """What the ranks of a run read in these steps, through the stream that training reads from."""
    recipe = config.Recipe.model_validate_json((run / "config.json").read_text())
    clips = Selection([open_index(recipe.data.shards, "train")])
    plan = Plan(frames_after_sampling(clips.frames, recipe.data), recipe.seed, BatchRule.of(recipe.data))
    steps: list[list[str]] = [[] for _ in range(first, last)]
    for rank in range(ranks):
        place = {"rank": rank, "world_size": ranks, "first_step": first, "last_step": last}
        for step, batch in stream(clips, plan, recipe.data, seed=recipe.seed, **place):
            steps[step - first] += batch.ids
    assert all(len(set(ids)) == len(ids) for ids in steps)
    return [set(ids) for ids in steps]


def test_forty_steps_on_1_2_and_4_ranks(corpus: Corpus, launcher: Launcher, tmp_path: Path) -> None:
    """Warmed up, as recipes are: at a rate of 1e-3 from the first step on, rounding (1e-7) grows to 2e-4 by then."""
    options = ["--train.epochs", "6", "--optim.lr", "3e-4", "--optim.warmup_steps", "10", *WITHOUT_DROPOUT]
    for ranks in (1, 2, 4):
        train(launcher, corpus.pretrain, tmp_path / str(ranks), ranks, 2, *options)
    reference = tmp_path / "1"
    expected, clips = records(reference), clips_of_steps(reference, 1, 0, 40)
    assert len(expected) >= 40
    for ranks in (2, 4):
        worst = assert_same_curve(records(tmp_path / str(ranks))[:40], expected[:40])
        print(f"{ranks} ranks: losses within {worst:.1e} of one rank's")
        assert clips_of_steps(tmp_path / str(ranks), ranks, 0, 40) == clips


def as_stopped_at(step: int, finished: Path, run: Path) -> None:
    """A copy of a finished run, as if it had been stopped after ``step`` steps."""
    shutil.copytree(finished, run)
    for folder in ("export", "evaluation"):
        shutil.rmtree(run / folder, ignore_errors=True)
    for folder in (run / "checkpoints").glob("step-*"):
        if read_manifest(folder).step > step:
            shutil.rmtree(folder)
    (run / "STATUS.json").write_text(json.dumps({"state": "stopped", "step": step, "seconds": 1.0}))


def test_going_on_at_another_number_of_ranks_and_stage(corpus: Corpus, launcher: Launcher, tmp_path: Path) -> None:
    """Two parameter groups with different learning rates, adamw, a checkpoint of step 10 of 20 on two ranks."""
    recipe = tmp_path / "two_rates.toml"
    rates = '[[optim.groups]]\npart = "visual"\nlr = 2e-4\n'
    recipe.write_text(
        f"{corpus.pretrain.read_text()}\n{rates}".replace('"tiny.toml"', f'"{corpus.pretrain.parent}/tiny.toml"')
    )
    options = ["--data.global_batch", "11", "--train.epochs", "4", "--train.checkpoint_every", str(STOP_AT)]
    options += ["--train.keep_checkpoints", "9", "--optim.warmup_steps", "10", *WITHOUT_DROPOUT]
    for stage in (1, 2, 3):
        whole = tmp_path / f"whole{stage}"
        train(launcher, recipe, whole, 2, stage, *options)
        expected = records(whole)
        assert len(expected) == END
        # Over the three stages every pair of (ranks, stage to go on at) and of (stage, stage to go on at) comes once.
        others = [(ranks, (stage + place) % 3 + 1) for place, ranks in enumerate((1, 3, 4))]
        for ranks, resumed_stage in ((2, stage), *others):
            run = tmp_path / f"{stage}-{ranks}-{resumed_stage}"
            as_stopped_at(STOP_AT, whole, run)
            output = train(launcher, recipe, run, ranks, resumed_stage, *options)
            assert f"going on from the checkpoint of step {STOP_AT}" in output
            if ranks == 2:
                assert records(run) == expected
                weights = "export/model.safetensors"
                assert (run / weights).read_bytes() == (whole / weights).read_bytes()
            worst = assert_same_curve(records(run), expected)
            print(f"ZeRO {stage} on 2 ranks, then {resumed_stage} on {ranks}: losses within {worst:.1e}")
            clips = clips_of_steps(run, ranks, STOP_AT, END)
            assert clips == clips_of_steps(whole, 2, STOP_AT, END)
            shutil.rmtree(run)


@pytest.mark.parametrize("clips", [7, 13])
def test_the_same_translations_on_any_ranks(
    clips: int,
    corpus: Corpus,
    launcher: Launcher,
    tmp_path: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A test split that deals unevenly, scored from one checkpoint; 4 ranks have a batch or less of it each. Weights as
    large as these, hardly trained, say something else about every other clip, where a short training would end in the
    same sentence for all."""
    recipe = tmp_path / "translation.toml"
    shards = pack_with_so_many_to_test(clips, corpus, tmp_path, command)
    recipe.write_text(TRANSLATE.replace('"tiny.toml"', f'"{corpus.pretrain.parent}/tiny.toml"').replace(START, ""))
    options = ["--data.shards", str(shards), "--train.epochs", "1", "--optim.lr", "1e-6"]
    options += ["--method.language_model.init_std", "1.0"]
    finished = tmp_path / "finished"
    train(launcher, recipe, finished, 2, 2, *options)
    expected = (finished / "evaluation/test/hypotheses.tsv").read_text()
    hypotheses = [row["hypothesis"] for row in csv.DictReader(expected.splitlines(), delimiter="\t")]
    assert len(hypotheses) == clips
    assert len(set(hypotheses)) > 2  # or it were a test of nothing
    scores = json.loads((finished / "evaluation/test/metrics.json").read_text())
    for ranks in (1, 2, 4):
        for stage in (0, 3):
            run = tmp_path / f"{ranks}-{stage}"
            as_stopped_at(10**9, finished, run)
            train(launcher, recipe, run, ranks, stage, *options)
            assert (run / "evaluation/test/hypotheses.tsv").read_text() == expected
            assert json.loads((run / "evaluation/test/metrics.json").read_text()) == scores
    for batch in (1, 3, 13):
        config_json = finished / "export/config.json"
        tree = json.loads(config_json.read_text())
        config_json.write_text(json.dumps(tree | {"evaluation": tree["evaluation"] | {"batch": batch}}))
        out = tmp_path / f"batch-{batch}"
        evaluate = ("-m", "sltscale.cli", "evaluate", "--run", finished, "--shards", shards, "--out", out)
        done = command(*evaluate)
        assert done.returncode == 0, done.stderr
        assert (out / "hypotheses.tsv").read_text() == expected


def pack_with_so_many_to_test(
    clips: int, corpus: Corpus, folder: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Path:
    with (corpus.source / "annotations.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for number, row in enumerate(rows):
        if row["split"] != "valid":
            row["split"] = "test" if number % 4 == 0 and number < 4 * clips else "train"
    with (folder / "annotations.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    done = command(
        *("tools/make_shards.py", "--corpus", "openasl", "--annotations", folder / "annotations.tsv"),
        *("--videos", corpus.source / "videos", "--out", folder / "shards", "--frame-size", "32", "--language", "de"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "shards"
