"""``sltscale evaluate`` and ``sltscale retrieve``: a split, scored; ``sltscale compare``: two runs on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sltscale.commands.arguments import Commands, positive
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
        command.set_defaults(work=work, bleurt=None)
        if work is evaluate:
            command.add_argument("--bleurt", metavar="CHECKPOINT", help="instead of the recipe's; none for no BLEURT")
    command = commands.add_parser("compare", help="two runs' translations, with confidence intervals and p-values")
    for name in ("first", "second"):
        command.add_argument(name, type=Path, metavar="RUN", help="run folder, or one written by sltscale evaluate")
    command.add_argument("--split", default="test")
    command.add_argument("--samples", type=positive, default=1000, help="bootstrap resamples")
    command.add_argument("--json", action="store_true")
    command.set_defaults(work=compare)


def evaluate(options: argparse.Namespace, _: Sequence[str]) -> None:
    _evaluate(options, retrieval=False)


def retrieve(options: argparse.Namespace, _: Sequence[str]) -> None:
    _evaluate(options, retrieval=True)


def compare(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.evaluation.comparison import compare_runs
    from sltscale.evaluation.report import table

    found, convention = compare_runs(options.first, options.second, options.split, options.samples)
    if options.json:
        scores = {name: asdict(values) for name, values in found.items()}
        print(json.dumps({"convention": convention, "samples": options.samples, "scores": scores}))
        return
    rows: list[list[object]] = [["score", str(options.first), str(options.second), "difference", "p"]]
    for name, values in found.items():
        first = f"{values.first:.2f} ± {values.first_interval:.2f}"
        second = f"{values.second:.2f} ± {values.second_interval:.2f}"
        rows.append([name, first, second, f"{values.second - values.first:+.2f}", f"{values.p:.4f}"])
    print(table(rows))
    print(f"{convention}, {options.split}; 95 % intervals and paired bootstrap, {options.samples} resamples")


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
    recipe = model.recipe
    if options.bleurt is not None:
        wanted = None if options.bleurt.lower() == "none" else options.bleurt
        evaluation = recipe.evaluation.model_copy(update={"bleurt": wanted})
        recipe = recipe.model_copy(update={"evaluation": evaluation})
    clips = Selection([open_index(options.shards, options.split)])
    scores = evaluate_split(model.method, model.tokenizer, recipe, clips, options.out, device)
    print(table([["metric", "value"]] + [[k, f"{v:.4f}"] for k, v in scores.items() if isinstance(v, int | float)]))
    print(f"written: {options.out}")
