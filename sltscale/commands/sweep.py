"""``sltscale sweep``: many runs of a grid of values, on a cluster (``sltscale submit --array``) or one by one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands, positive
from sltscale.errors import InputError


def add(commands: Commands) -> None:
    sweep = commands.add_parser("sweep", help="many runs: a grid of values, recipes and seeds")
    sweep_commands = sweep.add_subparsers(required=True, metavar="COMMAND")
    for name, work, text in (
        ("plan", sweep_plan, "write down the cells of a grid file, or add cells (sltscale submit --array does it too)"),
        ("run", sweep_run, "train one cell, or all that are unfinished, one after the other"),
        ("arguments", sweep_arguments, "training's arguments for a cell, one a line; none if it is finished"),
        ("status", sweep_status, "how far each cell is, and why it failed"),
        ("table", sweep_table, "the results of all cells, also as table.tsv and table.md in the folder"),
    ):
        command = sweep_commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("folder", type=Path, help="of the sweep")
        command.set_defaults(work=work)
        if name == "plan":
            command.add_argument("grid", type=Path, help="TOML file, see docs/sweeps.md; overrides are for all cells")
            command.add_argument("--recipe", help="name or TOML file (default: the grid's)")
            command.add_argument("--deepspeed", type=Path, default=Path("ds_configs/zero2.json"), metavar="JSON")
            command.set_defaults(overrides=True)
        if name in ("run", "arguments"):
            command.add_argument("--cell", type=int, required=name == "arguments", metavar="N", help="counted from 0")
        if name == "run":
            command.add_argument("--ranks", type=positive, metavar="N", help="processes to start on this machine")


def sweep_plan(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sltscale.sweeps.folder import plan, write
    from sltscale.sweeps.grid import read_grid

    sweep = plan(options.folder, options.deepspeed, read_grid(options.grid, options.recipe, overrides))
    write(sweep)
    for number, cell in enumerate(sweep.cells):
        print(f"{number}\t{cell.name}\t{cell.recipe} {' '.join(cell.overrides)}")


def sweep_run(options: argparse.Namespace, _: Sequence[str]) -> int:
    from sltscale.sweeps.folder import open_sweep
    from sltscale.sweeps.running import STOPPED, run_cell

    sweep = open_sweep(options.folder)
    cells = sweep.cells if options.cell is None else [sweep.cell(options.cell)]
    codes = []
    for cell in cells:
        codes.append(run_cell(sweep.run(cell), sweep.deepspeed, options.ranks))
        if codes[-1] == STOPPED or codes[-1] > 128:
            break
    return next((code for code in reversed(codes) if code), 0)


def sweep_arguments(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.sweeps.folder import open_sweep

    sweep = open_sweep(options.folder)
    run = sweep.run(sweep.cell(options.cell))
    if run.finished:
        return
    arguments = run.arguments()
    if any("\n" in argument for argument in arguments):
        raise InputError(f"cell {run.cell.name}: a value holds a line break; write it without")
    print("\n".join(arguments))


def sweep_status(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.evaluation.report import table
    from sltscale.sweeps.folder import open_sweep
    from sltscale.sweeps.results import results, status_rows

    print(table(status_rows(results(open_sweep(options.folder)))))


def sweep_table(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.evaluation.report import table
    from sltscale.sweeps.folder import open_sweep
    from sltscale.sweeps.results import result_rows, results, seed_rows, write_tables

    sweep = open_sweep(options.folder)
    found = results(sweep)
    write_tables(sweep.folder, found)
    print(table(result_rows(found)))
    if rows := seed_rows(found):
        print(f"\n{table(rows)}")
    print(f"\nwritten: {sweep.folder / 'table.tsv'}, {sweep.folder / 'table.md'}")
