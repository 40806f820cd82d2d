"""What feature caching costs: python tools/bench_accumulate.py [--recipe demo_pretrain] [--clips 8] [--parts 8].

One optimizer step of random clips, on one process: ``--clips`` at once; ``--parts`` times as many at once; and those
again in so many micro-batches with cached features, which is the same update. For each the seconds and the peak memory
beyond model and optimizer (GPU memory where there is a GPU, else resident memory). Other options tune the recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from measuring import peak_mib, seconds

from sltscale import config
from sltscale.data.text import build_corpus_tokenizer
from sltscale.engine.accumulate import accumulate
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.global_loss import global_loss
from sltscale.engine.signals import leave
from sltscale.methods import export
from sltscale.recipe_files import load_recipe
from sltscale.structures import Ragged, VideoBatch

WORDS = ("am", "auf", "der", "die", "fällt", "im", "in", "morgen", "nacht", "norden", "regen", "schnee", "und", "wind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo_pretrain")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--parts", type=int, default=8)
    parser.add_argument("--frames", type=int, nargs=2, default=(16, 48), help="of the shortest and the longest clip")
    parser.add_argument("--rounds", type=int, default=3, help="of which the quickest counts")
    arguments, overrides = parser.parse_known_args()
    device = start_processes()
    recipe = load_recipe(arguments.recipe, overrides)
    few, many = arguments.clips, arguments.clips * arguments.parts
    cases = {f"{few} clips at once": (few, 1), f"{many} clips at once": (many, 1)}
    cases[f"{many} clips in {arguments.parts}"] = (many, arguments.parts)
    steps = [Step(recipe, clips, parts, arguments.frames, device) for clips, parts in cases.values()]
    for step in steps:
        step.take()  # warms up
    memory = [peak_mib(step.take) for step in steps]
    times = [min(seconds(step.take) for _ in range(arguments.rounds)) for step in steps]
    print(f"{recipe.name}, {recipe.data.crop_size} px, {torch.get_num_threads()} threads, {device}")
    print(f"{'':24}{'s':>10}{'ms/frame':>12}{'MiB':>10}")
    for name, step, took, mib in zip(cases, steps, times, memory, strict=True):
        print(f"{name:24}{took:10.2f}{1000 * took / step.frames:12.2f}{mib:10.0f}")
    print(f"cached / at once: time x {times[2] / times[1]:.2f}, memory x {memory[2] / memory[1]:.2f}")


class Step:
    """Takes optimizer steps on the same clips: at once, or in several parts with cached features."""

    def __init__(
        self,
        recipe: config.Recipe,
        clips: int,
        parts: int,
        frames: Sequence[int],
        device: torch.device,
    ) -> None:
        texts = [" ".join(WORDS[(n + k) % len(WORDS)] for k in range(4 + n % 9)) for n in range(clips)]
        tokenizer = build_corpus_tokenizer(texts, ["de"], 120)
        lengths = (
            torch.linspace(frames[0], frames[1], clips)
            .long()[torch.randperm(clips, generator=torch.Generator())]
            .tolist()
        )
        self.frames = sum(lengths)
        size = recipe.data.crop_size
        torch.manual_seed(0)
        pixels = torch.randint(0, 256, (self.frames, size * 3 // 2, size), dtype=torch.uint8)
        names = [str(number) for number in range(clips)]
        self.batch = VideoBatch(names, Ragged.from_lengths(pixels, lengths), texts, ["de"] * clips)
        pieces = self.batch.split([clips // parts] * parts)
        model = export.build(recipe, tokenizer).to(device).train()
        self.micro_batches = [(piece, model.tokenise(tokenizer.encode, piece, (recipe.seed, 0))) for piece in pieces]
        self.engine = build_engine(model, recipe.optim, {}, micro_batches=parts > 1)
        self.device = device

    def take(self) -> None:
        if len(self.micro_batches) > 1:
            outputs = accumulate(self.engine, self.micro_batches, range(len(self.micro_batches)), self.device)
        else:
            outputs = self.engine(*(part.to(self.device) for part in self.micro_batches[0]))
        loss, _ = global_loss(outputs, self.engine.module.weights, self.batch, False)
        if len(self.micro_batches) == 1:
            self.engine.backward(loss)
        self.engine.step()


if __name__ == "__main__":
    main()
    leave(0)
