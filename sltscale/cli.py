"""The ``sltscale`` command: everything around training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sltscale import __version__
from sltscale.errors import InputError
from sltscale.recipe_files import load_recipe

if TYPE_CHECKING:
    from sltscale.data.shards.index import Index

# Heavy libraries are imported inside the commands that need them, so that the others answer at once.


def show_config(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    print(load_recipe(options.recipe, overrides).to_json(), end="")


def shards_verify(options: argparse.Namespace, _: Sequence[str]) -> int:
    from sltscale.data.shards.verify import verify, verify_folder

    for line in verify_folder(options.folder):
        print(line)
    defects = 0
    for index in _indexes(options.folder):
        found = verify(index)
        defects += len(found)
        for defect in found:
            print(defect)
        print(f"{index.split}: {len(index)} clips in {len(index.shards)} shards, {len(found) or 'no'} defects")
    return 2 if defects else 0


def shards_show(options: argparse.Namespace, _: Sequence[str]) -> None:
    for index in _indexes(options.folder):
        for number in range(len(index)):
            print(json.dumps(index.row(number), ensure_ascii=False))


def shards_merge(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.data.shards.merge import merge

    folder = Path(options.folder)
    for report in merge(folder):
        print(report.summary())
    print(f"written: {folder / 'report.html'}")


def shards_report(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.data.shards.report import write_shard_report

    folder = Path(options.folder)
    write_shard_report(folder)
    print(f"written: {folder / 'report.json'}, {folder / 'report.html'}")


def _indexes(folder: str) -> list[Index]:
    from sltscale.data.shards.index import open_index, splits

    names = splits(folder)
    if not names:
        raise InputError(f"{folder} holds no index; expected a folder made by tools/make_shards.py")
    return [open_index(folder, name) for name in names]


def evaluate(options: argparse.Namespace, _: Sequence[str]) -> None:
    _evaluate(options, "translation")


def retrieve(options: argparse.Namespace, _: Sequence[str]) -> None:
    _evaluate(options, "c2rl")


def _evaluate(options: argparse.Namespace, method: str) -> None:
    from sltscale.data.batches.selection import Selection
    from sltscale.data.shards.index import open_index
    from sltscale.engine.finished import default_device, load_run
    from sltscale.evaluation.report import table
    from sltscale.evaluation.splits import evaluate_split

    device = default_device()
    model = load_run(options.run, device)
    found = model.recipe.method.name
    if found != method:
        other = "retrieve" if found == "c2rl" else "evaluate"
        raise InputError(f"{options.run} is a {found} run, this command needs {method}; use sltscale {other}")
    clips = Selection([open_index(options.shards, options.split)])
    scores = evaluate_split(model.method, model.tokenizer, model.recipe, clips, options.out, device)
    print(table([["metric", "value"]] + [[k, f"{v:.4f}"] for k, v in scores.items() if isinstance(v, int | float)]))
    print(f"written: {options.out}")


def translate(options: argparse.Namespace, _: Sequence[str]) -> int:
    from sltscale.engine.finished import default_device, load_run
    from sltscale.evaluation.splits import translate_files
    from sltscale.methods.translation import Translation

    device = default_device()
    model = load_run(options.run, device)
    if not isinstance(model.method, Translation):
        raise InputError(f"{options.run} is a {model.recipe.method.name} run; sltscale translate needs translation")
    known = model.tokenizer.languages
    if options.language is None and len(known) != 1:
        raise InputError(f"the run knows {', '.join(known)}; choose one with --language")
    language = options.language or known[0]
    faults = 0
    for path, text in translate_files(model.method, model.tokenizer, model.recipe, options.clips, language, device):
        if isinstance(text, InputError):
            faults += 1
            print(f"error: {text}", file=sys.stderr, flush=True)
        else:
            print(f"{path}\t{text}", flush=True)
    return 2 if faults else 0


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="sltscale", description="Gloss-free sign language translation at scale.")
    main_parser.add_argument("--version", action="version", version=__version__)
    commands = main_parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("config", help="print a recipe, resolved", allow_abbrev=False)
    command.add_argument("recipe", help="name or TOML file; overrides as in training: --optim.lr 1e-4")
    command.set_defaults(work=show_config)

    shards = commands.add_parser("shards", help="look at shards").add_subparsers(required=True, metavar="COMMAND")
    for name, work, text in (
        ("verify", shards_verify, "compare every byte with the index; names shard and first differing sample"),
        ("show", shards_show, "print the index, one JSON object a clip"),
        ("merge", shards_merge, "index and reports of what tools/make_shards.py --part has packed"),
        ("report", shards_report, "what is in the shards, as report.json and report.html in their folder"),
    ):
        command = shards.add_parser(name, help=text)
        where = "shards/NAME" if name in ("merge", "report") else "shards/NAME, or its https:// or s3:// address"
        command.add_argument("folder", help=where)
        command.set_defaults(work=work)

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

    command = commands.add_parser("translate", help="translate video files")
    command.add_argument("--run", type=Path, required=True, help="run folder")
    command.add_argument("--language", help="BCP-47 code, if the run knows more than one")
    command.add_argument("clips", type=Path, nargs="+", metavar="CLIP")
    command.set_defaults(work=translate)
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    main_parser = parser()
    options, rest = main_parser.parse_known_args(arguments)
    if rest and options.work is not show_config:
        main_parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.work(options, rest) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
