"""``sltscale lexicon``: pseudo-glosses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands, positive, share
from sltscale.errors import InputError


def add(commands: Commands) -> None:
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
    command.add_argument("--width", type=positive, default=300, help="of vectors learnt from the sentences")
    command.add_argument("--max-share", type=share, default=1.0, help="leave out words in more of the sentences (0.4)")
    command.add_argument(
        "--with-dev-and-test", action="store_true", help="their words too, as in the papers' code: lets them leak"
    )
    command.add_argument("--out", type=Path, required=True, help="folder, for --method.lexicon")
    command.set_defaults(work=lexicon_build)


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
