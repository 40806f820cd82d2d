"""The ``sltscale`` command: everything around training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sltscale import __version__
from sltscale.commands import (
    checkpoints,
    doctor,
    forecast,
    lexicon,
    progress,
    recipes,
    scoring,
    shards,
    submit,
    sweep,
    translate,
    vocab,
)
from sltscale.errors import InputError


def parser() -> argparse.ArgumentParser:
    main_parser = argparse.ArgumentParser(prog="sltscale", description="Gloss-free sign language translation at scale.")
    main_parser.add_argument("--version", action="version", version=__version__)
    commands = main_parser.add_subparsers(required=True, metavar="COMMAND")
    for group in (
        recipes,
        shards,
        checkpoints,
        scoring,
        lexicon,
        translate,
        doctor,
        submit,
        progress,
        sweep,
        vocab,
        forecast,
    ):
        group.add(commands)
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    main_parser = parser()
    options, rest = main_parser.parse_known_args(arguments)
    if rest and not getattr(options, "overrides", False):
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
