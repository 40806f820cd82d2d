"""What a recipe may say of its data, through real training: frame budgets, mixtures, shards behind a URL."""

import json
import re
import shutil
from pathlib import Path

import pytest
from launching import ROOT, Launcher
from range_server import serving

from sltscale.data.shards.index import open_index

ZERO2 = ["--deepspeed", str(ROOT / "ds_configs/zero2.json")]
BUDGET = ["--data.global_batch", "none", "--data.global_frames", "400", "--data.bucket_window", "64"]


def train(launcher: Launcher, recipe: Path, run: Path, *arguments: str, ranks: int = 2) -> list[dict[str, float]]:
    """The records of its steps."""
    command = [*ZERO2, "--recipe", str(recipe), "--run", str(run), *arguments]
    launcher.check(ROOT / "sltscale/train.py", command, ranks=ranks)
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def losses(steps: list[dict[str, float]]) -> list[float]:
    return [step["loss"] for step in steps]


@pytest.mark.slow
def test_a_frame_budget_gives_the_same_steps_on_any_number_of_ranks(corpus, launcher: Launcher, tmp_path: Path) -> None:
    arguments = [*BUDGET, "--data.batch_multiple", "2", "--train.epochs", "2"]
    one = train(launcher, corpus.pretrain, tmp_path / "one", *arguments, ranks=1)
    two = train(launcher, corpus.pretrain, tmp_path / "two", *arguments, ranks=2)
    clips = len(open_index(corpus.shards, "train"))
    assert sum(step["clips"] for step in one) == 2 * clips
    assert max(step["frames"] for step in one) <= 400
    assert [(step["clips"], step["frames"]) for step in two] == [(step["clips"], step["frames"]) for step in one]
    assert losses(two)[0] == pytest.approx(losses(one)[0], rel=0.05)  # dropout differs
    manifest = json.loads(next((tmp_path / "two/checkpoints").glob("step-*/MANIFEST.json")).read_text())
    assert set(manifest["data"]) == {"seed", "epoch", "clips"}


@pytest.mark.slow
def test_a_mixture_takes_every_corpus_and_goes_on_exactly(corpus, launcher: Launcher, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(corpus.shards, second)
    clips = len(open_index(second, "train"))
    recipe = tmp_path / "mixture.toml"
    (tmp_path / "tiny.toml").write_text((corpus.pretrain.parent / "tiny.toml").read_text())
    mixed = f'\n[data]\ntemperature = 2.0\n[[data.mix]]\nshards = "{second}"\nweight = 2.0\n'
    recipe.write_text(corpus.pretrain.read_text() + mixed)
    whole = train(launcher, recipe, tmp_path / "whole", "--train.epochs", "1")
    assert sum(step["clips"] for step in whole) == 2 * clips
    run = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", run)
    (run / "STATUS.json").unlink()
    for checkpoint in sorted((run / "checkpoints").glob("step-*"))[1:]:  # as if killed after the first one
        shutil.rmtree(checkpoint)
    assert losses(train(launcher, recipe, run, "--train.epochs", "1")) == losses(whole)


@pytest.mark.slow
def test_shards_behind_a_url_train_as_those_of_a_folder(corpus, launcher: Launcher, tmp_path: Path) -> None:
    near = train(launcher, corpus.pretrain, tmp_path / "near", "--train.epochs", "1")
    launcher.environment = launcher.environment | {"SLTSCALE_CACHE": str(tmp_path / "cache")}
    with serving(corpus.shards) as server:
        server.faults["train-000000.tar"] = ["503", "503"]
        far = train(launcher, corpus.pretrain, tmp_path / "far", "--train.epochs", "1", "--data.shards", server.url)
    assert losses(far) == losses(near)
    tried_again = [
        int(number) for number in re.findall(r"\| ([0-9]+) reads tried again\n", (tmp_path / "far/log.txt").read_text())
    ]
    assert sum(tried_again) == 2
    assert server.gets["train-000000.tar"] >= len(open_index(corpus.shards, "train"))
    assert any((tmp_path / "cache").rglob("*"))
