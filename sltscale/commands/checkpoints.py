"""``sltscale checkpoint``: look at a run's checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands
from sltscale.errors import InputError


def add(commands: Commands) -> None:
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
