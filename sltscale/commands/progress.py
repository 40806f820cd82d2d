"""``sltscale progress``: whether a run whose job has ended is worth another start. slurm/environment.sh asks it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands
from sltscale.recipe_files import recipe_chain

STOPPED = 75  # engine.signals.EXIT_STOPPED, without its imports
# A job may be stopped while it is starting, through no fault of the run; but too short a limit would stop it for ever.
IDLE_STARTS = 3


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "progress",
        help="in a SLURM job, after its step: exit code 0 if the run should be requeued, 1 if not",
        description="Whether a run that ended with that exit code has come on since this start of the job.",
        allow_abbrev=False,
    )
    command.add_argument("--exit-code", type=int, required=True, metavar="N", help="of the step")
    command.add_argument("--recipe", default="demo", help="and the other arguments of training")
    command.add_argument("--run", type=Path, help="run folder (default: runs/RECIPE)")
    command.add_argument("--deepspeed", help=argparse.SUPPRESS)
    command.add_argument("--bad-data", help=argparse.SUPPRESS)
    command.set_defaults(work=progress, overrides=True)


def progress(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    job, start = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    if options.exit_code in (0, 2):
        why = "finished" if options.exit_code == 0 else "the input is at fault (exit code 2)"
        print(f"not requeued: {why}")
        return 1
    folders = [path for _, path in recipe_chain(options.recipe, overrides, options.run)]
    idle = start - max(_came_on(path, job) for path in folders)
    if idle == 0:
        print(f"requeued: {folders[-1]} came on in start {start}")
        return 0
    if options.exit_code == STOPPED and idle < IDLE_STARTS:
        print(f"requeued: start {start} was stopped before it came on, as at most {IDLE_STARTS - 1} in a row may be")
        return 0
    print(f"not requeued: no progress in {idle} starts of job {job}; the same would come again")
    return 1


def _came_on(path: Path, job: int) -> int:
    """The last start of the job that has added a checkpoint to the run in ``path``, or finished it; 0 if none has."""
    from sltscale.engine.run_folder import RunFolder

    folder = RunFolder(path)
    now, finished = folder.newest_step(), folder.status()["state"] == "finished"
    starts = [
        attempt["job_start"]
        for attempt in folder.attempts()
        if attempt.get("job") == job and (finished or attempt["step"] < now)
    ]
    return max(starts, default=0)
