"""Started by test_same_update.py and test_checkpoints.py: train a tiny method on batches made from a seed.

The global batches are the same at every world size; each rank takes the plan's share of them. For every variant and
stage given, a fresh engine takes the steps, and its state is left as a checkpoint in OUT/<variant>/zero<stage>.

Variants: "whole" takes each rank's share at once, "micro<n>" in n micro-batches, and the names in flawed_gathers.py at
once with such a gather.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from flawed_gathers import GATHERS
from torch import nn

from sltscale import config, parallel
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.lexicon import Lexicon, build_lexicon
from sltscale.data.tagging import tagger
from sltscale.data.text import build_corpus_tokenizer
from sltscale.data.word_vectors import Vectors, corpus_vectors
from sltscale.engine import checkpoint, loop
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.signals import StopRequest, leave
from sltscale.engine.telemetry import Telemetry
from sltscale.engine.watchdog import Watchdog
from sltscale.methods import export
from sltscale.structures import Ragged, VideoBatch

CLIPS = 24
WORDS = ("morgen", "kommt", "der", "regen", "die", "sonne", "geht", "heute", "nach", "hause", "gern", "wieder")


def recipe_for(
    method: str,
    optimizer: str,
    dropout: float,
    clip_norm: float | None,
    norm: str = "batch",
    global_batch: int = 8,
    micro_frames: int | None = None,
) -> config.Recipe:
    # A step that shows: clipping leaves little of the gradient.
    rate = {"adamw": 1e-3, "sgd": 0.2 if clip_norm is None else 4.0}[optimizer]
    tiny = {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32, "dropout": dropout, "max_positions": 32}
    visual = {
        "frames": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
        "transformer": tiny,
        "norm": norm,
    }
    packed = {key: visual[key] for key in ("frames", "transformer", "norm")} | {"temporal": {"width": 16}}
    methods = {
        "gfslt_vlp": {
            "name": "gfslt_vlp",
            "visual": packed,
            "text_encoder": tiny,
            "text_decoder": tiny,
            "group_size": 3,
        },
        "c2rl": {"name": "c2rl", "visual": visual, "text_encoder": tiny, "text_decoder": tiny},
        "translation": {
            "name": "translation",
            "visual": visual,
            "language_model": {
                "width": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "heads": 2,
                "feed_forward": 32,
                "dropout": dropout,
                "attention_dropout": 0.0,
                "max_positions": 32,
            },
        },
    }
    lora = {"rank": 2, "alpha": 2, "dropout": dropout}
    small_dino = {"width": 16, "layers": 1, "heads": 2, "patch": 8, "image_size": 16, "lora_blocks": 1, "lora": lora}
    local = {"width": 16, "heads": 2, "feed_forward": 32, "layers": [1, 1], "output_width": 16, "layer_scale": 0.5}
    hfa = {
        "visual": {
            "frames": small_dino,
            "temporal": local | {"dropout": dropout, "drop_path": dropout, "norm_input": norm == "batch"},
        },
        "language_model": methods["translation"]["language_model"],
        "lora": lora,
    }
    methods["hfa_pretraining"] = hfa | {"name": "hfa_pretraining", "head_width": 8, "head_dropout": dropout}
    methods["hfa_translation"] = hfa | {"name": "hfa_translation"}
    return config.Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "data": {
                "shards": "none",
                "frame_size": 16,
                "crop_size": 16,
                "global_batch": global_batch,
                "max_frames": 8,
                "micro_frames": micro_frames,
            },
            "text": {"max_tokens": 32},
            "evaluation": {"max_new_tokens": 20},
            "method": methods[method],
            "optim": {
                "name": optimizer,
                "lr": rate,
                "weight_decay": 0.01,
                "clip_norm": clip_norm,
                "groups": [{"part": "visual", "lr": rate / 2}],
            },
            "train": {"epochs": 4, "log_every": 1, "checkpoint_every": 1000},
        }
    )


def clip(number: int) -> tuple[torch.Tensor, str]:
    """Frames of six flat fields: random pixels average to frames that are all alike, and attention among alike steps
    has gradients that are small differences of large terms."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(1, 9, (), generator=generator))
    words = torch.randint(0, len(WORDS), (1 + number % 6,), generator=generator)
    fields = torch.randint(0, 256, (length, 3, 2), dtype=torch.uint8, generator=generator)
    frames = fields.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return frames, " ".join(WORDS[word] for word in words)


def share(plan: Plan, step: int) -> VideoBatch:
    numbers = plan.share(step, parallel.rank(), parallel.world_size()).tolist()
    frames, texts = zip(*(clip(number) for number in numbers), strict=True)
    return VideoBatch([str(n) for n in numbers], Ragged.from_list(frames), list(texts), ["de"] * len(numbers))


def draw_weights(model: nn.Module) -> None:
    """As of a model that has learnt something: matrices of deviation 1 / sqrt(width) instead of mBART's 0.02, which is
    meant for a width of 1024, and biases that are not zero. In a narrow model as it is drawn most gradients are so
    small that an update could be wrong unnoticed, and those of query biases are rounding."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # drawn as zeros, through which the other matrix learns nothing
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 2:
                parameter.mul_(1 / math.sqrt(16) / 0.02)
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def words_of(sentences: list[str]) -> Lexicon:
    def vectors(glosses: Sequence[str], found: Sequence[list[str]]) -> Vectors:
        return corpus_vectors(glosses, found, 8)

    return build_lexicon(sentences, tagger("words").analyse, vectors)


def budget(lengths: list[int], recipe: config.Recipe, parts: int) -> int:
    """The largest micro_frames that cuts every rank's share of the first step into so many micro-batches."""
    for frames in range(sum(lengths), 2 * recipe.data.max_frames - 1, -1):
        plan = Plan(lengths, recipe.seed, BatchRule.of(recipe.data), micro_frames=frames)
        if len(plan.micro_batches(0, parallel.world_size())[0]) == parts:
            return frames
    raise AssertionError(f"no micro_frames cuts the share of a rank into {parts}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="c2rl")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--clip_norm", type=float, help="no clipping if not given")
    parser.add_argument("--norm", default="batch")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--global_batch", type=int, default=8)
    parser.add_argument("--variants", default="whole")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--start", action="store_true", help="leave the weights before the first step in OUT/start")
    parser.add_argument("--resume", type=Path, help="checkpoint folder of an earlier call, for all variants and stages")
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()

    device = start_processes()
    settings = (options.method, options.optimizer, options.dropout, options.clip_norm, options.norm)
    plain = recipe_for(*settings, options.global_batch)
    lengths = [len(clip(number)[0]) for number in range(options.clips)]
    tokenizer = build_corpus_tokenizer([clip(number)[1] for number in range(options.clips)], ["de"], 60)
    lexicon = None
    if options.method == "hfa_pretraining":
        lexicon = words_of([clip(number)[1] for number in range(options.clips)])
    gather = parallel.gather
    for variant, stage in itertools.product(options.variants.split(","), map(int, options.stages.split(","))):
        parallel.gather = GATHERS.get(variant, gather)
        recipe, parts = plain, variant.removeprefix("micro")
        if parts != variant:
            recipe = recipe_for(*settings, options.global_batch, budget(lengths, plain, int(parts)))
        plan = Plan(lengths, recipe.seed, BatchRule.of(recipe.data), micro_frames=recipe.data.micro_frames)
        folder = RunFolder(options.out / variant / f"zero{stage}")
        folder.path.mkdir(parents=True, exist_ok=True)
        model = export.build(recipe, tokenizer, lexicon)
        draw_weights(model)
        engine = build_engine(
            model.to(device),
            recipe.optim,
            {"zero_optimization": {"stage": stage}},
            micro_batches=recipe.data.micro_frames is not None,
        )
        first_step = 0
        if options.resume is not None:
            latest, complaints = checkpoint.latest_checkpoint(options.resume)
            assert latest is not None, complaints
            checkpoint.restore(engine, latest)
            first_step = latest.step
        if options.start:
            checkpoint.save_checkpoint(engine, RunFolder(options.out / "start"), recipe, 0, plan.state(0))
        telemetry = Telemetry("tiny", folder if parallel.rank() == 0 else None, first_step, plan.steps(4))
        last_step = first_step + options.steps
        loop.train(
            engine,
            recipe,
            plan,
            ((step, share(plan, step)) for step in range(first_step, last_step)),
            tokenizer,
            folder=folder,
            telemetry=telemetry,
            first_step=first_step,
            device=device,
            stop=StopRequest(),
            watchdog=Watchdog(recipe.train.watchdog_seconds),
            seconds_before=0.0,
            evaluate=lambda committed: None,
        )
        checkpoint.save_checkpoint(engine, folder, recipe, last_step, plan.state(last_step))
        telemetry.close()
        engine.destroy()
    parallel.barrier()
    leave(0)


if __name__ == "__main__":
    main()
