"""``train.py --dry-run``: two real steps, the plan, a checkpoint there and back; broken recipes are refused."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, Launcher

from sltscale.miniature import tiny_recipe
from sltscale.recipe_files import load_recipe, recipe_names

Command = Callable[..., subprocess.CompletedProcess[str]]
TRAIN = ROOT / "sltscale/train.py"
ZERO3 = ["--deepspeed", str(ROOT / "ds_configs/zero3.json")]


def test_a_good_recipe_in_a_single_process(command: Command, corpus, tmp_path: Path) -> None:
    """The short form of the next."""
    run = tmp_path / "runs" / "tiny"
    done = command(TRAIN, *ZERO3, "--recipe", corpus.pretrain, "--run", run, "--dry-run", "--nodes", "2", "--gpus", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("on 2 ranks, each exactly once", "2 steps at ZeRO 3 on 1 CPU ranks", "equal in every bit"):
        assert expected in done.stdout
    assert not run.parent.exists()


@pytest.mark.slow
def test_a_good_recipe_and_what_it_starts_from(launcher: Launcher, corpus, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    arguments = [
        *ZERO3,
        "--recipe",
        str(corpus.translate),
        "--run",
        str(run),
        "--dry-run",
        "--nodes",
        "2",
        "--gpus",
        "3",
    ]
    output = launcher.check(TRAIN, arguments, ranks=2, cwd=tmp_path)
    lines = [
        line for line in output.splitlines() if line.startswith(("tiny_pretrain:", "tiny_translation:", "dry run:"))
    ]
    for name in ("tiny_pretrain", "tiny_translation"):
        own = [line for line in lines if line.startswith(f"{name}:")]
        assert "on 6 ranks, each exactly once" in own[0]
        assert "2 steps at ZeRO 3 on 2 CPU ranks" in own[1]
        assert "equal in every bit" in own[2]
    assert lines[-1].startswith("dry run: passed")
    assert not run.parent.exists()


def refused(command: Command, recipe: Path, *arguments: str | Path) -> str:
    """The one line of a refusal, by a single process."""
    done = command(TRAIN, *ZERO3, "--recipe", recipe, "--dry-run", *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "real_accelerator" not in line]
    assert line.startswith("error: ")
    return line


def test_broken_recipes(command: Command, corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "64 ranks" in refused(command, corpus.pretrain, "--run", run, "--nodes", "8", "--gpus", "8")
    rule = tmp_path / "rule.toml"
    text = corpus.pretrain.read_text().replace('"tiny.toml"', f'"{corpus.pretrain.parent}/tiny.toml"')
    rule.write_text(text + '\n[[optim.groups]]\npart = "no_such_tower"\nlr = 0.1\n')
    assert "no_such_tower" in refused(command, rule, "--run", run)
    assert not run.exists()


def test_tiny_recipes_are_valid_and_small() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        tiny = tiny_recipe(recipe, 2, None)
        assert tiny.optim == recipe.optim and tiny.method.name == recipe.method.name
        assert tiny.data.shards == recipe.data.shards and tiny.data.global_batch == 4
