"""Train a recipe, and first whatever it starts from; evaluate on the test split; print the table.

    deepspeed sltscale/train.py --deepspeed ds_configs/zero2.json [--recipe demo] [--run DIR] [--optim.lr 1e-4 ...]

The same command goes on where an earlier one was stopped or killed. Exit codes: 0 finished, 1 not saved, hung, or not
finite too often, 2 bad input (one line on stderr), 75 stopped by a signal after saving.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Started by path: this package's own modules must not answer to "import models" or "import data" of others.
    sys.path.pop(0)

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

from sltscale import launching
from sltscale.engine.signals import EXIT_STOPPED, HeldSignals, StoppedError, leave
from sltscale.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
    held = HeldSignals()
    try:
        return _start(options, overrides, held)
    except InputError as error:
        return _report(str(error), held, 2)
    except KeyboardInterrupt:  # outside of the training steps, where a signal is a request
        return EXIT_STOPPED


def _start(options: argparse.Namespace, overrides: list[str], held: HeldSignals) -> int:
    """InputError for whatever can be refused."""
    place = launching.here()
    # What can be known of recipe and settings before the imports below, which take seconds.
    from sltscale.engine.deepspeed_json import read_deepspeed_json
    from sltscale.recipe_files import check_ranks, recipe_chain

    deepspeed_json = read_deepspeed_json(options.deepspeed)
    chain = recipe_chain(options.recipe, overrides, options.run)
    if not options.dry_run:
        check_ranks(chain, place.world_size)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for it when it is imported
    # Pages of 2 MiB for tensors on a CPU: a fifth off the ResNet's time (docs/performance.md); torch reads it once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Imported here: the data workers import this file as their main module and need none of it.
    from sltscale import preflight, rehearsal, stages
    from sltscale.engine.checkpoint import NotSavedError
    from sltscale.engine.finite import NonFiniteError
    from sltscale.engine.run_folder import FencedError

    planned = preflight.plan_stages(chain)
    preflight.check_stages(planned)
    if not options.dry_run:
        preflight.check_kernels(planned, deepspeed_json)
    held.heed()
    try:
        if options.dry_run:
            rehearsal.rehearse(planned, deepspeed_json, options.nodes * options.gpus if options.gpus else None)
        else:
            stages.run(planned, deepspeed_json)
    except StoppedError as stopped:
        if place.rank == 0:
            print(stopped, flush=True)
        return EXIT_STOPPED
    except (NonFiniteError, NotSavedError, FencedError) as error:
        return _report(str(error), held, 1)
    return 0


def _report(error: str, held: HeldSignals, code: int) -> int:
    """One line, from rank 0. Mostly all ranks find the same fault, and the launcher ends the others when rank 0 is
    gone; another rank that is still there after a while was alone with it, and speaks. Before the ranks have met, rank
    0 may be behind by part of the time that this one took, which on a slow machine is long."""
    rank = os.environ.get("RANK", "0")
    with suppress(KeyboardInterrupt):  # ended by the launcher: rank 0 has spoken
        if rank != "0":
            apart = 0.0 if held.heeded else (time.time() - psutil.Process().create_time()) / 2
            held.heed()
            time.sleep(max(5.0, apart))
            error = f"rank {rank}: {error}"
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a recipe and what it starts from, evaluate on the test split.",
        epilog="Every recipe key can be set: --optim.lr 1e-4; `sltscale config RECIPE` prints them.",
        allow_abbrev=False,
    )
    parser.add_argument("--deepspeed", type=Path, required=True, metavar="JSON", help="engine settings, ds_configs/")
    parser.add_argument("--recipe", default="demo", help="name or TOML file (default: demo)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/RECIPE)")
    parser.add_argument(
        "--bad-data", choices=("stop", "skip"), help="about damaged clips; short for --data.bad_data (default: stop)"
    )
    parser.add_argument("--dry-run", action="store_true", help="try everything small, on CPU ranks; train nothing")
    parser.add_argument("--nodes", type=int, default=1, help="of the run that --dry-run is about")
    parser.add_argument("--gpus", type=int, help="per node, likewise (default: as many ranks as now)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    options, overrides = parser.parse_known_args(arguments)
    if (options.nodes != 1 or options.gpus) and not options.dry_run:
        parser.error("--nodes and --gpus belong to --dry-run; the launcher decides how many ranks there are")
    if options.nodes < 1 or (options.gpus is not None and options.gpus < 1):
        parser.error("--nodes and --gpus: expected at least 1 each")
    if options.nodes != 1 and options.gpus is None:
        parser.error("--nodes needs --gpus, how many each node has")
    if options.bad_data is not None:
        overrides += ["--data.bad_data", options.bad_data]
    return options, overrides


if __name__ == "__main__":
    leave(main())
