"""``sltscale evaluate`` and ``sltscale retrieve``: a split, scored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands
from sltscale.errors import InputError


def add(commands: Commands) -> None:
    for name, work, text in (
        ("evaluate", evaluate, "translate a split and score it"),
        ("retrieve", retrieve, "rank a split's clips and sentences against each other"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--run", type=Path, required=True, help="run folder")
        command.add_argument("--shards", required=True, help="shards/NAME, or its https:// or s3:// address")
        command.add_argument("--split", default="test")
        command.add_argument(
            "--out", type=Path, required=True, help="folder for metrics.json and the ranked or translated clips"
        )
        command.set_defaults(work=work)


def evaluate(options: argparse.Namespace, _: Sequence[str]) -> None:
    _evaluate(options, retrieval=False)


def retrieve(options: argparse.Namespace, _: Sequence[str]) -> None:
    _evaluate(options, retrieval=True)


def _evaluate(options: argparse.Namespace, retrieval: bool) -> None:
    from sltscale.data.batches.selection import Selection
    from sltscale.data.shards.index import open_index
    from sltscale.engine.finished import default_device, load_run
    from sltscale.evaluation.report import table
    from sltscale.evaluation.splits import evaluate_split
    from sltscale.methods.base import RetrievalMethod

    device = default_device()
    model = load_run(options.run, device)
    compares = isinstance(model.method, RetrievalMethod)
    if compares != retrieval:
        does, other = ("retrieves", "retrieve") if compares else ("translates", "evaluate")
        raise InputError(f"{options.run}: its method, {model.recipe.method.name}, {does}; use sltscale {other}")
    clips = Selection([open_index(options.shards, options.split)])
    scores = evaluate_split(model.method, model.tokenizer, model.recipe, clips, options.out, device)
    print(table([["metric", "value"]] + [[k, f"{v:.4f}"] for k, v in scores.items() if isinstance(v, int | float)]))
    print(f"written: {options.out}")
