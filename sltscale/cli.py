"""The ``sltscale`` command: everything around training."""

from __future__ import annotations

import argparse
import json
import os
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


def show(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from sltscale.evaluation.report import table
    from sltscale.methods.parameters import count

    recipe = load_recipe(options.recipe, overrides)
    counted = count(recipe.method, options.vocabulary or recipe.text.vocabulary, options.pseudo_glosses)
    print(table([["module", "trainable", "total"], *counted.rows]))
    if counted.as_published is not None:
        print(counted.as_published)


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


def checkpoint_verify(options: argparse.Namespace, _: Sequence[str]) -> int:
    faults = 0
    for folder in _checkpoint_folders(options.run):
        complaint = _fault_in(folder)
        faults += complaint is not None
        print(complaint or f"checkpoint {folder.name}: whole", flush=True)
    return 2 if faults else 0


def checkpoint_show(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.engine.keeping import read_scores
    from sltscale.engine.manifest import read_manifest
    from sltscale.evaluation.report import table

    folders = _checkpoint_folders(options.run)
    scores = read_scores(options.run / "checkpoints")
    rows: list[list[object]] = [["step", "ranks", "ZeRO", "MiB", "data", "sltscale", "dev scores", "verified"]]
    for folder in folders:
        try:
            found = read_manifest(folder)
        except InputError as error:
            rows.append([folder.name.removeprefix("step-").lstrip("0"), *["-"] * 6, str(error)])
            continue
        about = found.manifest
        data = ", ".join(f"{key} {value}" for key, value in about["data"].items())
        scored = ", ".join(f"{key} {value:.4g}" for key, value in scores.get(found.step, {}).items()) or "-"
        version = about["versions"]["sltscale"]
        size = f"{found.size / 2**20:.1f}"
        verified = _fault_in(folder) or "yes"
        rows.append([found.step, about["world_size"], about["zero_stage"], size, data, version, scored, verified])
    print(table(rows))


def checkpoint_convert(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.engine.finished import export_checkpoint

    chosen = export_checkpoint(options.run, options.step, options.out)
    print(f"written: {options.out}, the weights of step {chosen.step}")


def _checkpoint_folders(run: Path) -> list[Path]:
    from sltscale.engine.manifest import folders

    found = folders(run / "checkpoints")
    if not found:
        raise InputError(f"{run} holds no checkpoints; expected a run folder written by training, e.g. runs/demo")
    return found


def _fault_in(folder: Path) -> str | None:
    from sltscale.engine.manifest import verify

    try:
        verify(folder)
    except InputError as error:
        return str(error)
    return None


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


def translate(options: argparse.Namespace, _: Sequence[str]) -> int:
    from sltscale.engine.finished import default_device, load_run
    from sltscale.evaluation.splits import translate_files
    from sltscale.models.translator import Translator

    device = default_device()
    model = load_run(options.run, device)
    if not isinstance(model.method, Translator):
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


def lexicon_build(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.data.lexicon_build import build_from_shards

    lexicon, lines = build_from_shards(
        options.shards,
        splits=("train", "dev", "test") if options.with_dev_and_test else ("train",),
        language=options.language,
        tagger_name=options.tagger,
        vectors_file=options.vectors,
        width=options.width,
        max_share=options.max_share,
    )
    try:
        lexicon.save(options.out)
    except OSError as error:
        raise InputError(f"{options.out} cannot be written: {error.strerror}") from None
    for line in lines:
        print(line)
    print(f"written: {options.out}")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, found {text!r}")
    return share


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="sltscale", description="Gloss-free sign language translation at scale.")
    main_parser.add_argument("--version", action="version", version=__version__)
    commands = main_parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("config", help="print a recipe, resolved", allow_abbrev=False)
    command.add_argument("recipe", help="name or TOML file; overrides as in training: --optim.lr 1e-4")
    command.set_defaults(work=show_config)

    command = commands.add_parser("show", help="what a recipe builds", allow_abbrev=False)
    command.add_argument("recipe", help="name or TOML file; overrides as in training")
    command.add_argument("--parameters", action="store_true", required=True, help="count them, by module")
    command.add_argument("--vocabulary", type=_positive, metavar="N", help="token ids (default: text.vocabulary)")
    command.add_argument("--pseudo-glosses", type=_positive, metavar="K", help="words of the lexicon, for HFA")
    command.set_defaults(work=show)

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

    checkpoints = commands.add_parser("checkpoint", help="look at a run's checkpoints")
    checkpoint_commands = checkpoints.add_subparsers(required=True, metavar="COMMAND")
    for name, run_command, text in (
        ("verify", checkpoint_verify, "compare every byte of every checkpoint with its manifest; names what differs"),
        ("show", checkpoint_show, "a table of the checkpoints: how they were written, whether they are whole"),
        ("convert", checkpoint_convert, "write a checkpoint's weights as a folder for exchange (safetensors)"),
    ):
        command = checkpoint_commands.add_parser(name, help=text)
        command.add_argument("run", type=Path, help="run folder")
        if name == "convert":
            command.add_argument("--step", type=int, help="which checkpoint (default: the newest that is whole)")
            command.add_argument("--out", type=Path, required=True, help="new folder")
        command.set_defaults(work=run_command)

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

    lexicon = commands.add_parser("lexicon", help="pseudo-glosses").add_subparsers(required=True, metavar="COMMAND")
    command = lexicon.add_parser("build", help="the content words of the training sentences, and a vector for each")
    command.add_argument("--shards", action="append", required=True, help="shards/NAME or URL; again for each of a mix")
    command.add_argument("--language", help="BCP-47 code, if the shards hold more than one")
    command.add_argument(
        "--tagger",
        default="auto",
        help="auto: spaCy if a model is installed, else the tagger that ships its data; shipped; words; a spaCy model",
    )
    command.add_argument(
        "--vectors", type=Path, metavar="FILE", help="fastText .vec or .bin; else learnt from the sentences"
    )
    command.add_argument("--width", type=_positive, default=300, help="of vectors learnt from the sentences")
    command.add_argument("--max-share", type=_share, default=1.0, help="leave out words in more of the sentences (0.4)")
    command.add_argument(
        "--with-dev-and-test", action="store_true", help="their words too, as in the papers' code: lets them leak"
    )
    command.add_argument("--out", type=Path, required=True, help="folder, for --method.lexicon")
    command.set_defaults(work=lexicon_build)

    command = commands.add_parser("translate", help="translate video files")
    command.add_argument("--run", type=Path, required=True, help="run folder")
    command.add_argument("--language", help="BCP-47 code, if the run knows more than one")
    command.add_argument("clips", type=Path, nargs="+", metavar="CLIP")
    command.set_defaults(work=translate)
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    main_parser = parser()
    options, rest = main_parser.parse_known_args(arguments)
    if rest and options.work not in (show_config, show):
        main_parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = options.work(options, rest) or 0
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
