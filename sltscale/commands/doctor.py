"""``sltscale doctor``: is everything that a run needs in order, and what to do where it is not."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands
from sltscale.errors import InputError
from sltscale.recipe_files import load_recipe


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "doctor", help="examine this machine and what a recipe needs on it; names a remedy for each fault"
    )
    command.add_argument("--recipe", help="name or TOML file; overrides as in training: --data.shards DIR")
    command.add_argument("--run", type=Path, help="run folder, there or to be made (default: runs/RECIPE)")
    command.add_argument("--shards", help="shards/NAME, or its https:// or s3:// address (default: the recipe's)")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.set_defaults(work=doctor, overrides=True)


def doctor(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """0 when nothing is broken, 1 when there are faults."""
    if overrides and options.recipe is None:
        raise InputError(f"unexpected argument {overrides[0]!r}; to tune a recipe, name it with --recipe")
    from sltscale.diagnosis.examination import examination
    from sltscale.evaluation.report import table

    recipe = None if options.recipe is None else load_recipe(options.recipe, overrides)
    run = options.run or (Path("runs") if recipe is None else Path("runs") / recipe.name)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed speaks while it is loaded
        findings = list(examination(recipe, run, options.shards))
    faults = sum(finding.state == "fault" for finding in findings)
    warnings = sum(finding.state == "warning" for finding in findings)
    host = socket.gethostname()
    if options.json:
        print(json.dumps({"host": host, "findings": [dataclasses.asdict(one) for one in findings]}, indent=1))
    else:
        told = [f"{one.found} -> {one.remedy}" if one.remedy else one.found for one in findings]
        rows = [[one.state, one.subject, text] for one, text in zip(findings, told, strict=True)]
        print(table([["", "looked at", "found -> remedy"], *rows]))
        print(f"{host}: {faults or 'no'} faults, {warnings or 'no'} warnings")
    return 1 if faults else 0
