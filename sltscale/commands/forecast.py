"""``sltscale forecast``: what a training run will take - memory of a GPU, steps, hours, bytes - before it is queued."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sltscale.commands.arguments import Commands, positive
from sltscale.config import FeatureSettings, Recipe
from sltscale.errors import InputError
from sltscale.recipe_files import load_recipe

if TYPE_CHECKING:
    from sltscale.forecast.fitting import Case, Fitting
    from sltscale.forecast.workload import Corpus, Length

GB = 1e9
TFLOPS = 50.0


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "forecast", help="memory, steps, hours and bytes that training will take", allow_abbrev=False
    )
    command.add_argument("recipe", help="name or TOML file; overrides as in training: --optim.lr 1e-4")
    command.add_argument("--nodes", type=positive, default=1)
    command.add_argument("--gpus", type=positive, default=1, metavar="G", help="per node, a rank for each (default: 1)")
    command.add_argument("--gpu-memory", type=_number, default=80.0, metavar="GB", help="of each (default: 80)")
    command.add_argument(
        "--deepspeed",
        type=Path,
        metavar="JSON",
        help="engine settings (default: ds_configs/zero2.json, fp32)",
    )
    command.add_argument("--shards", metavar="DIR", help="in place of the recipe's data.shards")
    command.add_argument("--clips", type=positive, metavar="N", help="of training, where there are no shards")
    command.add_argument("--frames", type=positive, metavar="N", help="of a clip, likewise (default: data.max_frames)")
    command.add_argument("--tokens", type=positive, metavar="N", help="of a sentence, likewise (default: 32)")
    command.add_argument("--vocabulary", type=positive, metavar="N", help="token ids (default: text.vocabulary)")
    command.add_argument("--pseudo-glosses", type=positive, metavar="K", help="words of the lexicon, for HFA")
    speed = command.add_mutually_exclusive_group()
    speed.add_argument("--frames-per-second", type=_number, metavar="F", help="that one GPU was measured to train")
    speed.add_argument(
        "--tflops", type=_number, metavar="T", help=f"that one GPU is taken to sustain (default: {TFLOPS:g})"
    )
    command.add_argument("--json", action="store_true", help="everything, in bytes")
    command.set_defaults(work=forecast, overrides=True)


def forecast(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if options.shards is not None:
        overrides = [*overrides, "--data.shards", options.shards]
    recipe = load_recipe(options.recipe, overrides)

    from sltscale.forecast.fitting import Fitting
    from sltscale.forecast.states import EngineSetting
    from sltscale.forecast.workload import run_length

    if isinstance(recipe.method, FeatureSettings):
        raise InputError(f"recipe {recipe.name} trains nothing; forecast the recipe that it starts from")
    engine = EngineSetting(stage=2)
    if options.deepspeed is not None:
        from sltscale.engine.deepspeed_json import read_deepspeed_json

        engine = EngineSetting.of(read_deepspeed_json(options.deepspeed))
    recipe, notes = _own_sizes(recipe)
    corpus, ranks = _corpus(recipe, options), options.nodes * options.gpus
    vocabulary = _vocabulary(recipe, options)
    fitting = Fitting(recipe, vocabulary, corpus, ranks, int(options.gpu_memory * GB), engine)
    length = run_length(corpus, recipe, options.nodes)
    chosen = fitting.case(engine, fitting.own_policy)
    hours, speed = _hours(chosen, fitting, length, options)
    nearest = None if chosen.fits else fitting.nearest()
    if options.json:
        found = _as_json(recipe, fitting, chosen, nearest, length, hours)
        print(json.dumps(found | {"basis": corpus.basis, "speed": speed, "notes": notes}, indent=2))
        return
    for line in (*notes, *_work(recipe, fitting, corpus, length, options.nodes), speed):
        print(line)
    print(_table(fitting.cases()))
    print(_verdict(chosen, nearest, options.gpu_memory))


def _corpus(recipe: Recipe, options: argparse.Namespace) -> Corpus:
    from sltscale.data.shards.index import splits
    from sltscale.forecast.workload import assume_corpus, read_corpus

    remote = "://" in recipe.data.shards
    if remote or "train" in splits(Path(recipe.data.shards)):
        return read_corpus(recipe)
    if options.shards is not None:
        raise InputError(f"--shards {options.shards} holds no train split; give a folder made by tools/make_shards.py")
    return assume_corpus(recipe, options.clips, options.frames, options.tokens)


def _vocabulary(recipe: Recipe, options: argparse.Namespace) -> Any:
    from sltscale.data.lexicon import load_lexicon
    from sltscale.methods.base import Vocabulary

    pseudo_glosses = options.pseudo_glosses
    lexicon = Path(getattr(recipe.method, "lexicon", ""))
    if pseudo_glosses is None and (lexicon / "lexicon.json").is_file():
        pseudo_glosses = len(load_lexicon(lexicon))
    if pseudo_glosses is None and getattr(recipe.method, "pseudo_gloss", 0) > 0:
        raise InputError(
            f"recipe {recipe.name} learns pseudo-glosses, and {lexicon} holds no lexicon: give --pseudo-glosses K, how "
            "many there are"
        )
    return Vocabulary(options.vocabulary or recipe.text.vocabulary, 1, 2, pseudo_glosses or 0)


def _own_sizes(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Without published weights, whose files need not be at hand; the sizes that the recipe itself gives count."""
    notes: list[str] = []

    def change(tree: Any, path: str) -> Any:
        if not isinstance(tree, dict):
            return tree
        if tree.get("pretrained"):
            notes.append(f"note: {path}.pretrained is not opened; the sizes in the recipe count")
        if tree.get("offload_activations"):
            notes.append(f"note: {path}.offload_activations is taken as off: what it moves out counts as kept")
        cleared = {"pretrained": None, "offload_activations": False}
        return {n: cleared[n] if n in cleared else change(branch, f"{path}.{n}") for n, branch in tree.items()}

    tree = recipe.model_dump()
    return Recipe.model_validate(tree | {"method": change(tree["method"], "method")}), notes


def _hours(
    chosen: Case, fitting: Fitting, length: Length | None, options: argparse.Namespace
) -> tuple[float | None, str]:
    """Of the whole run, and what that rests on."""
    share, ranks = sum(fitting.share().frames), fitting.world_size
    if options.frames_per_second is not None:
        rate, basis = options.frames_per_second, f"{options.frames_per_second:g} frames/s a GPU, as given"
    else:
        tflops = options.tflops or TFLOPS
        rate = share / (chosen.activations.flops / (tflops * 1e12))
        basis = f"{rate:.0f} frames/s a GPU, assuming {tflops:g} TFLOP/s and a loader that keeps up; not measured"
    hours = None if length is None else length.frames / (rate * ranks) / 3600
    flops = f"{chosen.activations.flops / share / 1e9:.1f} GFLOP a frame"
    return hours, f"speed: {basis}; {flops}" + ("" if hours is None else f"; about {hours:.1f} hours in all")


def _work(recipe: Recipe, fitting: Fitting, corpus: Corpus, length: Length | None, nodes: int) -> list[str]:
    share, parameters = fitting.share(), fitting.parameters
    lines = [
        f"{recipe.name}: {recipe.method.name}, {parameters.numel() / 1e6:.2f} M parameters, "
        f"{parameters.trained_numel() / 1e6:.2f} M trained; {nodes} nodes, {fitting.world_size} ranks",
        f"from {corpus.basis}",
        f"busiest rank: {len(share.frames)} clips, {sum(share.frames)} frames, {sum(share.tokens)} tokens a step",
    ]
    if length is None:
        return [*lines, "steps, hours and bytes: unknown; give --clips N, or --shards DIR"]
    data = "" if length.bytes is None else f"; {length.bytes / GB:.2f} GB read by each node in an epoch"
    return [
        *lines,
        f"{recipe.train.epochs} epochs, {length.steps} steps, {length.clips} clips, {length.frames} frames, "
        f"about {length.tokens} tokens{data}",
    ]


def _table(cases: Sequence[Case]) -> str:
    from sltscale.evaluation.report import table

    head = ["GB on each GPU", "checkpoints", "weights", "masters", "gradients", "optimizer", "buffers"]
    rows = [[*head, "kept by autograd", "contrastive", "peak", "CPU", "fits"]]
    for case in cases:
        held, kept = case.gpu, case.activations
        sizes = (held.parameters, held.masters, held.gradients, held.optimizer, held.buffers + held.communication)
        cells = [*sizes, kept.saved, kept.contrastive, case.peak, case.cpu.total()]
        numbers = [f"{size / GB:.2f}" for size in cells]
        rows.append([case.engine.title, case.policy, *numbers, "yes" if case.fits else "no"])
    return table(rows)


def _verdict(chosen: Case, nearest: Case | None, memory: float) -> str:
    from sltscale.forecast.fitting import RESERVED

    asked = f"{chosen.engine.title}, checkpoints {chosen.policy}: {chosen.peak / GB:.2f} GB"
    beside = f"beside {RESERVED / GB:g} GB set aside for CUDA, NCCL and gaps"
    if chosen.fits:
        return f"fits: {asked} of {memory:g} GB, {beside}"
    if nearest is None:
        return f"does not fit: {asked}, {beside}, for {memory:g} GB; nothing tried does: more GPUs or shorter clips"
    own = " (with bf16 enabled)" if nearest.engine.bf16 else ""
    changes = " ".join((f"--deepspeed {nearest.deepspeed_file}{own}", *nearest.changes))
    return f"does not fit: {asked}, {beside}, for {memory:g} GB; this does, at {nearest.peak / GB:.2f} GB: {changes}"


def _as_json(
    recipe: Recipe, fitting: Fitting, chosen: Case, nearest: Case | None, length: Length | None, hours: float | None
) -> dict[str, Any]:
    def plain(case: Case) -> dict[str, Any]:
        return dataclasses.asdict(case) | {"title": case.engine.title, "deepspeed_file": case.deepspeed_file}

    return {
        "recipe": recipe.name,
        "ranks": fitting.world_size,
        "parameters": fitting.parameters.numel(),
        "trained": fitting.parameters.trained_numel(),
        "share": dataclasses.asdict(fitting.share()),
        "run": None if length is None else dataclasses.asdict(length) | {"hours": hours},
        "chosen": plain(chosen),
        "nearest": None if nearest is None else plain(nearest),
        "cases": [plain(case) for case in fitting.cases()],
    }


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return number
