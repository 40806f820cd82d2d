"""``sltscale shards``: look at shards, whole, in parts or merged."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sltscale.commands.arguments import Commands
from sltscale.errors import InputError

if TYPE_CHECKING:
    from sltscale.data.shards.index import Index


def add(commands: Commands) -> None:
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
