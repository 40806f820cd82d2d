"""``sltscale config`` and ``sltscale show``: a recipe, resolved, and what it builds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sltscale.commands.arguments import Commands, positive
from sltscale.recipe_files import load_recipe


def add(commands: Commands) -> None:
    command = commands.add_parser("config", help="print a recipe, resolved", allow_abbrev=False)
    command.add_argument("recipe", help="name or TOML file; overrides as in training: --optim.lr 1e-4")
    command.set_defaults(work=show_config, overrides=True)

    command = commands.add_parser("show", help="what a recipe builds", allow_abbrev=False)
    command.add_argument("recipe", help="name or TOML file; overrides as in training")
    command.add_argument("--parameters", action="store_true", required=True, help="count them, by module")
    command.add_argument("--vocabulary", type=positive, metavar="N", help="token ids (default: text.vocabulary)")
    command.add_argument("--pseudo-glosses", type=positive, metavar="K", help="words of the lexicon, for HFA")
    command.set_defaults(work=show, overrides=True)


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
