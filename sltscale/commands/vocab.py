"""``sltscale vocab``: the vocabulary of a published language model, cut to a corpus."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sltscale.commands.arguments import Commands
from sltscale.errors import InputError


def add(commands: Commands) -> None:
    vocab = commands.add_parser("vocab", help="vocabulary of a language model").add_subparsers(
        required=True, metavar="COMMAND"
    )
    command = vocab.add_parser("trim", help="keep the pieces that the training sentences use, and the special tokens")
    command.add_argument("tokenizer", metavar="TOKENIZER", help="folder or hub name")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--corpus",
        action="append",
        metavar="SHARDS",
        help="shards/NAME or URL, its train split; again for each of a mix",
    )
    source.add_argument("--sentences", type=Path, metavar="FILE", help="training sentences, one a line")
    command.add_argument(
        "--model", type=Path, metavar="FOLDER", help="cut this model's embeddings and output layer too"
    )
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        help="new folder, for --text.tokenizer and, with --model, as pretrained model",
    )
    command.set_defaults(work=vocab_trim)


def vocab_trim(options: argparse.Namespace, _: Sequence[str]) -> None:
    from sltscale.data.shards.index import open_index
    from sltscale.data.vocabulary import trim

    if options.corpus is not None:
        sentences = [text for folder in options.corpus for text in open_index(folder, "train").texts()]
    else:
        try:
            sentences = options.sentences.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{options.sentences} cannot be read ({error}); expected sentences, one a line") from None
    for line in trim(options.tokenizer, sentences, options.out, options.model):
        print(line)
    print(f"written: {options.out}")
