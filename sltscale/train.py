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
import signal
import time
from collections.abc import Sequence

from sltscale import launching
from sltscale.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    options, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as SIGINT: a job may be told to end while it is starting
        signal.signal(number, signal.default_int_handler)
    try:
        place = launching.here()
        # What can be known of recipe and settings before the imports below, which take seconds.
        from sltscale.engine.deepspeed_json import read_deepspeed_json
        from sltscale.recipe_files import check_ranks, recipe_chain

        read_deepspeed_json(options.deepspeed)
        chain = recipe_chain(options.recipe, overrides, options.run)
        if not options.dry_run:
            check_ranks(chain, place.world_size)
    except InputError as error:
        _report(str(error))
        return 2
    if options.dry_run:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for it when it is imported
    # Pages of 2 MiB for tensors on a CPU, a fifth off a step there (docs/performance.md); torch reads it once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Imported here: the data workers import this file as their main module and need none of it.
    from sltscale import stages
    from sltscale.engine.checkpoint import NotSavedError
    from sltscale.engine.finite import NonFiniteError
    from sltscale.engine.run_folder import FencedError
    from sltscale.engine.signals import EXIT_STOPPED

    try:
        if options.dry_run:
            from sltscale import rehearsal

            ranks = options.nodes * options.gpus if options.gpus else None
            rehearsal.rehearse(options.deepspeed, options.recipe, overrides, options.run, ranks)
        else:
            stages.run(options.deepspeed, options.recipe, overrides, options.run)
    except InputError as error:
        _report(str(error))
        return 2
    except stages.StoppedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, flush=True)
        return EXIT_STOPPED
    except (NonFiniteError, NotSavedError, FencedError) as error:
        _report(str(error))
        return 1
    except KeyboardInterrupt:  # outside of the training steps, where a signal is a request
        return EXIT_STOPPED
    return 0


def _report(error: str) -> None:
    """One line, from rank 0. Mostly all ranks find the same fault, and the launcher ends the others when rank 0 is
    gone; another rank that is still there after a while was alone with it, and speaks."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        try:
            time.sleep(5)
        except KeyboardInterrupt:  # ended by the launcher: rank 0 has spoken
            return
        error = f"rank {rank}: {error}"
    print(f"error: {error}", file=sys.stderr, flush=True)


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
    exit_code = main()
    from sltscale.engine.signals import leave

    leave(exit_code)
