"""The results table's trainings fit the recipes, each has what it starts from, and the table finds its place."""

import importlib.util
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from sltscale.recipe_files import load_recipe
from sltscale.sweeps.folder import open_sweep

TOOL = Path(__file__).parents[2] / "tools/results_table.py"
Run = Callable[..., int]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_table", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["results_table.py", "sweep", "--no-training", *arguments])
        return tool.main()

    monkeypatch.chdir(tmp_path)
    return call


def test_every_cell_is_a_recipe_and_starts_from_an_earlier_one(tool: ModuleType, run: Run, tmp_path: Path) -> None:
    assert run() == 0
    cells = open_sweep(tmp_path / "sweep").cells
    assert len(cells) == 3 * len(tool.TRAININGS)
    seen: set[str] = set()
    for cell in cells:
        recipe = load_recipe(cell.recipe, cell.overrides)
        assert (recipe.seed, recipe.data.shards) == (int(cell.values["seed"]), "shards/results")
        if recipe.start is not None:
            assert recipe.start.run in seen
        seen.add(f"sweep/{cell.name}/{cell.recipe}")
    clips = {load_recipe(cell.recipe, cell.overrides).data.synthetic for cell in cells}
    assert len(clips) == 1
    for system in tool.SYSTEMS.values():
        order = tool._needed([next(name for name, other in tool.SYSTEMS.items() if other is system)])
        assert order[-1] == system.translation
        assert system.pretraining is None or system.pretraining == order[0]


def test_the_table_takes_the_place_of_the_last_one(
    tool: ModuleType, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"# Measured\n\nBefore.\n\n{tool.TITLE}\n\nOld.\n\n## After\n\nEnd.\n")
    assert run("--into", str(page), "--only", "gfslt", "hfa") == 0
    first = page.read_text()
    assert first.startswith(f"# Measured\n\nBefore.\n\n{tool.TITLE}\n\n") and first.endswith("\n\n## After\n\nEnd.\n")
    assert "Old." not in first and "| GFSLT, no pretraining | - | - | - |" in first and "| C2RL" not in first
    prefix, *commands = [line.strip() for line in first.splitlines() if line.startswith("    ")][1:]
    assert [shlex.split(command)[2] for command in commands] == [
        *("hfa_pretrain_tiny", "gfslt_baseline_tiny", "hfa_slt_mapper_tiny", "hfa_slt_tiny")
    ]
    assert prefix.startswith('train="deepspeed --num_gpus 2 sltscale/train.py --deepspeed ds_configs/zero2.json')
    assert run("--into", str(page), "--only", "gfslt", "hfa") == 0
    assert page.read_text() == first
    page.write_text("# Measured\n")
    assert run("--into", str(page)) == 0
    assert page.read_text().startswith(f"# Measured\n\n{tool.TITLE}\n\n")


def test_means_over_the_finished_seeds(
    tool: ModuleType, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, bleu in ((1, 40.0), (2, 50.0)):
        folder = tmp_path / f"sweep/gfslt-slt-seed{seed}/gfslt_baseline_tiny"
        (folder / "evaluation/test").mkdir(parents=True)
        (folder / "evaluation/test/metrics.json").write_text(json.dumps({"bleu4": bleu, "chrf": bleu + 1}))
        status = {"state": "finished", "seconds": 60.0 * seed}
        (folder / "STATUS.json").write_text(json.dumps(status))
    assert run("--only", "gfslt") == 0
    assert "| GFSLT, no pretraining | - | - | 45.0 (7.1) | - | 46.0 (7.1) | - | 2 | 1.5 |" in capsys.readouterr().out


def test_another_budget_wants_another_folder(tool: ModuleType, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--seeds", "1", "2") == 0
    with pytest.raises(SystemExit) as caught:
        run("--seeds", "1")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit, match="2"):
        run("--only", "gfslt2")
