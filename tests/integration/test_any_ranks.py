"""The same recipe and command on 1, 2 and 4 ranks: the same steps (short form: multiprocess/test_same_update.py)."""

import json
from pathlib import Path

import pytest
from launching import ROOT, Launcher
from tiny_recipes import Corpus

from sltscale import config
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import stream
from sltscale.data.shards.index import open_index

TRAIN = ROOT / "sltscale/train.py"
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(3600)]
# Every rank draws its own dropout masks.
TOWERS = ("visual.transformer", "text_encoder", "text_decoder")
WITHOUT_DROPOUT = [word for tower in TOWERS for word in (f"--method.{tower}.dropout", "0")]


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
