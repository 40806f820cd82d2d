"""Grid files, the cells that they come to, and what a sweep's folder says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sltscale import cli
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.recipe_files import load_recipe
from sltscale.sweeps.folder import CellRun, Sweep, array, open_sweep, plan, write
from sltscale.sweeps.grid import Cell, read_grid
from sltscale.sweeps.results import result_rows, results, seed_rows, status_rows, write_tables

ENGINE = Path("ds_configs/zero2.json")
Grid = Callable[[str], Path]


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    def write_grid(text: str) -> Path:
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return path

    return write_grid


def cells(path: Path, recipe: str | None = "demo", overrides: tuple[str, ...] = ()) -> list[Cell]:
    return read_grid(path, recipe, overrides)


def test_combinations_come_first_and_the_last_key_varies_fastest(grid: Grid) -> None:
    text = """
    recipe = "demo"
    [grid]
    "optim.lr" = [1e-4, 0.25]
    seed = [1, 2]
    [[cells]]
    name = "no-clipping"
    optim.clip_norm = "none"
    """
    found = cells(grid(text), None, ("--train.epochs", "2"))
    assert [cell.name for cell in found] == [
        *("optim.lr=0.0001_seed=1", "optim.lr=0.0001_seed=2", "optim.lr=0.25_seed=1", "optim.lr=0.25_seed=2"),
        "no-clipping",
    ]
    assert found[1].overrides == ("--train.epochs", "2", "--optim.lr", "0.0001", "--seed", "2")
    assert found[1].values == {"optim.lr": "0.0001", "seed": "2"}
    assert {cell.recipe for cell in found} == {"demo"}


def test_values_arrive_in_training_as_they_were_written(grid: Grid) -> None:
    text = """
    [grid]
    "optim.lr" = [1.2345678901e-5]
    "data.augment" = ["off"]
    "optim.groups" = [[{part = "visual.frames", frozen = true}]]
    """
    (cell,) = cells(grid(text))
    recipe = load_recipe(cell.recipe, cell.overrides)
    assert recipe.optim.lr == 1.2345678901e-5
    assert recipe.data.augment == "off"
    assert (recipe.optim.groups[0].part, recipe.optim.groups[0].frozen) == ("visual.frames", True)


def test_names_are_those_of_folders_and_never_the_same(grid: Grid) -> None:
    text = """
    [grid]
    recipe = ["demo", "demo_pretrain"]
    "data.shards" = ["shards/a b", "shards/a/b"]
    """
    found = cells(grid(text), None)
    assert [cell.recipe for cell in found] == ["demo", "demo", "demo_pretrain", "demo_pretrain"]
    names = [cell.name for cell in found]
    assert len(set(names)) == 4
    assert all(name.startswith("demo") and "/" not in name and " " not in name for name in names)
    assert names == [cell.name for cell in cells(grid(text), None)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[grid]\nseed = [1]\n[grdi]\n", "unknown key grdi"),
        ("[grid]\nseed = 1\n", r"grid\.seed is 1; expected a list"),
        ("[grid]\nseed = []\n", r"grid\.seed is \[\]; expected a list"),
        ("", "holds no cells"),
        ("cells = 3", r"expected \[\[cells\]\]"),
        ("[grid]\nseed = [1, 1]\n", "two cells are called seed=1"),
        ('[[cells]]\nname = "../up"\n', r"cell name '\.\./up'; expected letters"),
        ("[grid\n", "not valid TOML"),
        ('recipe = "demo"\n[grid]\nseed = [1]\n', "is one of recipe 'demo', asked for is 'demo_pretrain'"),
    ],
)
def test_a_grid_that_is_none_is_refused(text: str, complaint: str, grid: Grid) -> None:
    with pytest.raises(InputError, match=complaint):
        cells(grid(text), "demo_pretrain")


def test_a_grid_without_a_recipe_is_refused(grid: Grid) -> None:
    with pytest.raises(InputError, match="names no recipe"):
        cells(grid("[grid]\nseed = [1]\n"), None)


def test_a_cell_that_training_would_refuse_is_refused_before(grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"optim\.lrr"):
        plan(tmp_path, ENGINE, cells(grid('[grid]\n"optim.lrr" = [1]\n')))


def test_a_sweep_grows_but_its_cells_stay_as_they_were(grid: Grid, tmp_path: Path) -> None:
    write(plan(tmp_path, ENGINE, cells(grid("[grid]\nseed = [1, 3]\n"))))
    write(plan(tmp_path, ENGINE, cells(grid("[grid]\nseed = [1, 2, 3]\n"))))
    sweep = open_sweep(tmp_path)
    assert [cell.name for cell in sweep.cells] == ["seed=1", "seed=3", "seed=2"]
    with pytest.raises(InputError, match="there is no cell 3"):
        sweep.cell(3)
    with pytest.raises(InputError, match="holds cell seed=3, which the grid has not"):
        plan(tmp_path, ENGINE, cells(grid("[grid]\nseed = [1, 2]\n")))
    with pytest.raises(InputError, match="holds cell seed=1 with recipe demo --seed 1, not as asked for"):
        plan(tmp_path, ENGINE, cells(grid("[grid]\nseed = [1, 2, 3]\n"), overrides=("--train.epochs", "9")))
    assert open_sweep(tmp_path) == sweep


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        open_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"cells": [{"nam')
    with pytest.raises(InputError, match="is damaged"):
        open_sweep(tmp_path)


def test_submission_asks_for_the_cells_that_are_not_finished(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without an sbatch that would be asked
    site, folder, path = tmp_path / "site.env", tmp_path / "sweep", grid("[grid]\nseed = [1, 2, 3, 4, 5]\n")
    site.write_text("SBATCH_ACCOUNT=me\n")
    submission = ["submit", "demo", "--processes", "2", "--array", str(path), "--run", str(folder), "--site", str(site)]
    assert cli.main([*submission, "--at-once", "2", "--dry-run"]) == 0
    script = capsys.readouterr().out
    assert {"#SBATCH --array=0-4%2", "#SBATCH --ntasks-per-node=2", f"set -- {folder}"} <= set(script.splitlines())
    assert not folder.exists()
    assert cli.main([*submission, "--data.global_batch", "1"]) == 2
    assert "2 ranks, but recipe demo has global batches of 1 clips" in capsys.readouterr().err

    sweep = plan(folder, ENGINE, cells(path))
    write(sweep)
    for number in (0, 2):
        finish(sweep.run(sweep.cells[number]), 1.0)
    held = attempt(sweep.run(sweep.cells[1]))
    assert cli.main([*submission, "--dry-run"]) == 0
    assert "#SBATCH --array=3-4\n" in capsys.readouterr().out
    held.close()
    for number in (1, 3, 4):
        finish(sweep.run(sweep.cells[number]), 1.0)
    assert cli.main(submission) == 0
    assert "nothing to submit: the 5 cells" in capsys.readouterr().out


def test_numbers_as_sbatch_takes_them() -> None:
    assert array([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert array([5]) == "5"


@pytest.fixture
def sweep(grid: Grid, tmp_path: Path) -> Sweep:
    """Cells of a recipe that starts from another one."""
    return plan(tmp_path / "sweep", ENGINE, cells(grid("[grid]\nseed = [1, 2, 3]\n")))


def attempt(run: CellRun) -> RunFolder:
    folder = run.run_folder
    folder.open(load_recipe(run.cell.recipe, run.cell.overrides), {}, {}, 1)
    return folder


def state_of(sweep: Sweep, number: int) -> tuple[str, str]:
    one = results(sweep)[number]
    return one.state, one.why


def test_the_state_of_a_cell_is_read_from_its_runs(sweep: Sweep) -> None:
    run = sweep.run(sweep.cells[0])
    assert [folder.path.name for _, folder in run.stages] == ["demo_pretrain", "demo"]
    assert state_of(sweep, 0) == ("waiting", "")
    folder = attempt(run)
    state, why = state_of(sweep, 0)
    assert state == "running"
    assert why.startswith("demo: process ")
    assert sweep.unfinished() == [1, 2]
    folder.close()
    assert state_of(sweep, 0)[0] == "broken"
    assert sweep.unfinished() == [0, 1, 2]

    run.failure.write_text(json.dumps({"start": "job 5, start 1", "rank": 3, "host": "n7", "reason": "out of luck"}))
    assert state_of(sweep, 0) == ("failed", "out of luck (rank 3 on n7, job 5, start 1)")
    folder = attempt(run)  # another start, which has not failed yet
    assert state_of(sweep, 0)[0] == "running"
    folder.set_status("stopped", step=3, seconds=1)
    folder.steps.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    folder.close()
    assert state_of(sweep, 0) == ("stopped", "demo, by a signal")
    assert results(sweep)[0].steps == 3


def finish(run: CellRun, bleu4: float) -> None:
    folder = attempt(run)
    folder.checkpoints.mkdir(exist_ok=True)
    (folder.checkpoints / "scores.json").write_text(json.dumps({"5": {"bleu4": bleu4 + 1}, "9": {"bleu4": bleu4}}))
    (folder.path / "evaluation/test").mkdir(parents=True, exist_ok=True)
    (folder.path / "evaluation/test/metrics.json").write_text(json.dumps({"bleu4": bleu4, "signature": "x"}))
    folder.set_status("finished", step=9, seconds=1)
    folder.close()


def test_tables_of_what_came_out(sweep: Sweep) -> None:
    write(sweep)
    for cell, bleu4 in zip(sweep.cells, (10.0, 13.0), strict=False):
        finish(sweep.run(cell), bleu4)
    found = results(sweep)
    assert [row[:5] for row in status_rows(found)[1:3]] == [
        [0, "seed=1", "done", 0, "bleu4 11.00 at step 5"],
        [1, "seed=2", "done", 0, "bleu4 14.00 at step 5"],
    ]
    assert result_rows(found) == [
        ["cell", "seed", "state", "steps", "dev bleu4", "bleu4"],
        ["seed=1", "1", "done", 0, 11.0, 10.0],
        ["seed=2", "2", "done", 0, 14.0, 13.0],
        ["seed=3", "3", "waiting", 0, None, None],
    ]
    assert seed_rows(found) == [["over seeds", "n", "bleu4"], ["demo", 2, "11.50 ± 2.12"]]
    write_tables(sweep.folder, found)
    assert (sweep.folder / "table.tsv").read_text().splitlines()[1:3] == [
        "seed=1\t1\tdone\t0\t11.0\t10.0",
        "seed=2\t2\tdone\t0\t14.0\t13.0",
    ]
    assert "| seed=3 | 3 | waiting | 0 |  |  |\n" in (sweep.folder / "table.md").read_text()
