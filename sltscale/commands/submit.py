"""``sltscale submit``: a training job for SLURM, checked before it waits in the queue."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands, positive
from sltscale.errors import InputError
from sltscale.recipe_files import check_ranks, recipe_chain
from sltscale.submission import CHECKOUT, Job, Script, check, has_cluster, read_site, render, submit


def add(commands: Commands) -> None:
    command = commands.add_parser("submit", help="train a recipe as a job of a SLURM cluster", allow_abbrev=False)
    command.add_argument("recipe", help="name or TOML file; overrides as in training: --optim.lr 1e-4")
    command.add_argument("--nodes", type=positive, default=1)
    per_node = command.add_mutually_exclusive_group(required=True)
    per_node.add_argument("--gpus", type=positive, metavar="G", help="per node, a process for each")
    per_node.add_argument("--processes", type=positive, metavar="P", help="per node, where there are no GPUs")
    command.add_argument("--cpus", type=positive, metavar="C", help="per process")
    command.add_argument("--time", help="limit of each start: minutes, HH:MM:SS or DAYS-HH:MM:SS")
    command.add_argument(
        "--run",
        type=Path,
        help="run folder (default: runs/RECIPE); with --array that of the sweep (default: sweeps/GRID)",
    )
    command.add_argument(
        "--array", type=Path, metavar="GRID", help="a job for every cell of this grid file that is not finished"
    )
    command.add_argument("--at-once", type=positive, metavar="N", help="with --array: at most so many jobs at a time")
    zero2 = CHECKOUT / "ds_configs/zero2.json"
    command.add_argument(
        "--deepspeed", type=Path, default=zero2, metavar="JSON", help="(default: ds_configs/zero2.json)"
    )
    command.add_argument("--max-requeues", type=int, metavar="N", help="then the job ends (default: 100)")
    command.add_argument("--site", type=Path, metavar="FILE", help="(default: slurm/site.env, if there is one)")
    command.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    command.set_defaults(work=submit_job, overrides=True)


def submit_job(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if not options.deepspeed.is_file():
        raise InputError(f"--deepspeed {options.deepspeed} does not exist; see ds_configs/ for complete ones")
    if options.array is not None:
        _submit_sweep(options, overrides)
        return
    if options.at_once is not None:
        raise InputError("--at-once is about the jobs of a sweep; name its grid file with --array")
    # The job's working folder is the checkout.
    named = str(Path(options.recipe).absolute()) if options.recipe.endswith(".toml") else options.recipe
    chain = recipe_chain(named, overrides, options.run.absolute() if options.run else None)
    recipe, run = chain[-1]
    check_ranks(chain, _ranks(options))
    engine = ("--deepspeed", str(options.deepspeed.absolute()))
    script = _script(options, "train", recipe.name, ("--recipe", named, "--run", str(run), *engine, *overrides))
    if not options.dry_run:
        check(script)
        print(f"submitted: job {submit(script)}, run folder {run}")


def _submit_sweep(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sltscale.sweeps.folder import array, plan, write
    from sltscale.sweeps.grid import read_grid

    folder = options.run or CHECKOUT / "sweeps" / options.array.stem
    sweep = plan(folder, options.deepspeed, read_grid(options.array, options.recipe, overrides))
    for cell in sweep.cells:
        check_ranks([(recipe, run.path) for recipe, run in sweep.run(cell).stages], _ranks(options))
    numbers = sweep.unfinished()
    if not numbers:
        print(f"nothing to submit: the {len(sweep.cells)} cells of {folder} are finished or being trained")
        return
    elements = array(numbers) + (f"%{options.at_once}" if options.at_once else "")
    script = _script(options, "sweep", folder.name, (str(sweep.folder),), array=elements)
    if not options.dry_run:
        check(script)
        write(sweep)
        job = submit(script)
        print(f"submitted: job {job}, cells {array(numbers)} of {len(sweep.cells)}, sweep folder {folder}")


def _ranks(options: argparse.Namespace) -> int:
    return options.nodes * (options.gpus or options.processes)


def _script(
    options: argparse.Namespace, script: Script, name: str, arguments: tuple[str, ...], array: str | None = None
) -> str:
    """The rendered script; a dry run prints it, and what sbatch says of it."""
    job = Job(
        name=name,
        arguments=arguments,
        nodes=options.nodes,
        processes=options.gpus or options.processes,
        gpus=options.gpus is not None,
        cpus=options.cpus,
        time=options.time,
        array=array,
        max_requeues=options.max_requeues,
    )
    rendered = render(script, read_site(options.site), job)
    if options.dry_run:
        print(rendered, end="")
        print(check(rendered) if has_cluster() else "not checked: no SLURM controller here", file=sys.stderr)
    return rendered
