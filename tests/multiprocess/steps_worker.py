"""Started by test_same_update.py and test_checkpoints.py: train a tiny method on batches made from a seed.

The global batches are the same at every world size; each rank takes the plan's share of them. For every stage given,
a fresh engine takes the steps, and its state is left as a checkpoint in OUT/zero<stage>.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sltscale import config, parallel
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.text import build_corpus_tokenizer
from sltscale.engine import checkpoint, loop
from sltscale.engine.deepspeed_engine import build_engine, leave, start_processes
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.signals import StopRequest
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
    micro_frames: int | None = None,
) -> config.Recipe:
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
    return config.Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "data": {
                "shards": "none",
                "frame_size": 16,
                "crop_size": 16,
                "global_batch": 8,
                "max_frames": 8,
                "micro_frames": micro_frames,
            },
            "text": {"max_tokens": 32},
            "evaluation": {"max_new_tokens": 20},
            "method": methods[method],
            "optim": {
                "name": optimizer,
                "lr": 0.05 if optimizer == "sgd" else 1e-3,
                "weight_decay": 0.01,
                "clip_norm": clip_norm,
                "groups": [{"part": "visual", "lr": 0.02 if optimizer == "sgd" else 5e-4}],
            },
            "train": {"epochs": 4, "log_every": 1, "checkpoint_every": 1000},
        }
    )


def clip(number: int) -> tuple[torch.Tensor, str]:
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(1, 9, (), generator=generator))
    words = torch.randint(0, len(WORDS), (1 + number % 6,), generator=generator)
    frames = torch.randint(0, 256, (length, 24, 16), dtype=torch.uint8, generator=generator)
    return frames, " ".join(WORDS[word] for word in words)


def share(plan: Plan, step: int) -> VideoBatch:
    numbers = plan.share(step, parallel.rank(), parallel.world_size()).tolist()
    frames, texts = zip(*(clip(number) for number in numbers), strict=True)
    return VideoBatch([str(n) for n in numbers], Ragged.from_list(frames), list(texts), ["de"] * len(numbers))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="c2rl")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--clip_norm", type=float, help="no clipping if not given")
    parser.add_argument("--norm", default="batch")
    parser.add_argument("--micro_frames", type=int)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="checkpoint folder of an earlier call, for all stages")
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()

    device = start_processes()
    recipe = recipe_for(
        options.method, options.optimizer, options.dropout, options.clip_norm, options.norm, options.micro_frames
    )
    plan = Plan(
        [len(clip(number)[0]) for number in range(CLIPS)],
        recipe.seed,
        BatchRule.of(recipe.data),
        micro_frames=options.micro_frames,
    )
    tokenizer = build_corpus_tokenizer([clip(number)[1] for number in range(CLIPS)], ["de"], 60)
    for stage in map(int, options.stages.split(",")):
        folder = RunFolder(options.out / f"zero{stage}")
        folder.path.mkdir(parents=True, exist_ok=True)
        settings = {"zero_optimization": {"stage": stage}}
        model = export.build(recipe, tokenizer)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:  # at mBART's deviation of 0.02 so narrow a model attends evenly to everything,
                    parameter.mul_(5)  # and the gradients of its queries drown in rounding
        engine = build_engine(
            model.to(device),
            recipe.optim,
            settings,
            micro_batches=options.micro_frames is not None,
        )
        first_step = 0
        if options.resume is not None:
            latest, complaints = checkpoint.latest_checkpoint(options.resume)
            assert latest is not None, complaints
            checkpoint.restore(engine, latest)
            first_step = latest.step
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
