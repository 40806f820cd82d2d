"""``sltscale translate``: sentences for video files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands
from sltscale.errors import InputError


def add(commands: Commands) -> None:
    command = commands.add_parser("translate", help="translate video files")
    command.add_argument("--run", type=Path, required=True, help="run folder")
    command.add_argument("--language", help="BCP-47 code, if the run knows more than one")
    command.add_argument("clips", type=Path, nargs="+", metavar="CLIP")
    command.set_defaults(work=translate)


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
