"""Started by test_optimizers.py: steps at every stage, compared with separate torch optimizers in one process."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from sltscale import config, parallel
from sltscale.engine import checkpoint
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.deepspeed_json import read_deepspeed_json
from sltscale.engine.fragments import held_fragments, torch_optimizer
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.schedules import Progress, set_learning_rate
from sltscale.engine.signals import leave
from sltscale.models.layers import GlobalBatchNorm
from sltscale.models.memory import checkpoint_blocks

ROOT = Path(__file__).parents[2]
EPOCHS, STEPS_PER_EPOCH, ROWS, CLIP_NORM = 2, 4, 12, 3.0
TOTAL = EPOCHS * STEPS_PER_EPOCH
SAVED = 5  # a step after which the decoder is due neither at once nor for the first time
ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
RULES: list[dict[str, Any]] = [
    {"part": "tower", "frozen": True},
    {"part": "*.base_layer", "frozen": True},
    {"part": "*", "only": "lora", "name": "adam", "lr": 2e-3, "weight_decay": 0.0, "schedule": "one_cycle"},
    {"part": "decoder", "name": "adamw", "lr": 5e-3, "betas": [0.9, 0.98], "schedule": "cosine_epoch", "period": 3},
    {"part": "*", "only": "norm_bias", "lr": 0.02, "schedule": "constant"},
]


class Small(nn.Module):
    """checkpointed: the body, batch norm and all, is computed twice."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5))
        self.body = nn.Sequential(nn.Linear(16, 16), GlobalBatchNorm(16), nn.Tanh())
        checkpoint_blocks([self.body], config.ActivationSettings(checkpoint_activations=checkpointed))
        self.adapted = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, 5)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["adapted"]), self)
        nn.init.normal_(self.adapted.lora_B.default.weight, std=0.3)
        self.requires_grad_(True)
        self.tower.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of squared errors."""
        return (self.decoder(self.adapted(self.body(self.tower(x)))) - y).square().sum()


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 6, generator=generator), torch.randn(ROWS, 5, generator=generator)


def progress(step: int) -> Progress:
    return Progress(step, TOTAL, step // STEPS_PER_EPOCH, EPOCHS, step % STEPS_PER_EPOCH)


def recipe() -> config.Recipe:
    return config.Recipe.model_validate(
        {
            "name": "small",
            "data": {"shards": "none", "frame_size": 16, "crop_size": 16, "global_batch": ROWS},
            "method": {"name": "c2rl"},
            "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 0.01, "clip_norm": CLIP_NORM, "groups": RULES},
            "train": {"epochs": EPOCHS},
        }
    )


def plain_steps() -> tuple[list[dict[str, Tensor]], int]:
    """The weights after each step of separate torch optimizers and torch's own schedulers on the whole batch, and how
    many of the steps were clipped."""
    model = Small(checkpointed=False)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(not name.startswith("tower") and ".base_layer." not in name)
    weight = [named["body.0.weight"]]
    vectors = [named["body.0.bias"], named["body.1.weight"], named["body.1.bias"]]
    lora = [parameter for name, parameter in named.items() if "lora_" in name]
    decoder = [named["decoder.weight"], named["decoder.bias"]]
    sgd = torch.optim.SGD(weight, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    constant = torch.optim.SGD(vectors, lr=0.02, momentum=0.9, nesterov=True)
    adam = torch.optim.Adam(lora, lr=2e-3)
    groups = [{"params": decoder[:1], "weight_decay": 0.01}, {"params": decoder[1:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.98))
    per_step = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, TOTAL)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, TOTAL)
    per_epoch = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, EPOCHS)
    weights, clipped = [], 0
    for step in range(TOTAL):
        model.zero_grad()
        x, y = global_batch(step)
        (model(x, y) / ROWS).backward()
        due = step % STEPS_PER_EPOCH % 3 == 0
        used = [*weight, *vectors, *lora, *(decoder if due else [])]
        clipped += bool(nn.utils.clip_grad_norm_(used, CLIP_NORM) > CLIP_NORM)
        for optimizer in (sgd, constant, adam, *([adamw] if due else [])):
            optimizer.step()
        per_step.step()
        if step + 1 < TOTAL:
            one_cycle.step()
        if (step + 1) % STEPS_PER_EPOCH == 0:
            per_epoch.step(step // STEPS_PER_EPOCH)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return weights, clipped


def held_state(engine: Any, part: str) -> list[Tensor]:
    """Copies of this rank's weights of that part and of their optimizer state."""
    state = torch_optimizer(engine).state
    return [
        tensor.detach().clone()
        for fragment in held_fragments(engine)
        if fragment.name.startswith(part)
        for _, tensor in [("", fragment.view(fragment.flat)), *sorted(state.get(fragment.flat, {}).items())]
    ]


def take_steps(engine: Any, settings: config.OptimSettings, steps: range) -> Iterator[int]:
    for step in steps:
        set_learning_rate(engine.optimizer, progress(step), settings)
        x, y = (tensor[parallel.rank() :: parallel.world_size()] for tensor in global_batch(step))
        engine.backward(engine(x, y) * parallel.world_size() / ROWS)
        before = held_state(engine, "decoder")
        engine.step()
        after = held_state(engine, "decoder")
        if step % STEPS_PER_EPOCH % 3:
            assert len(before) == len(after) and all(map(torch.equal, before, after)), f"step {step}: not due"
        elif before:
            assert not torch.equal(before[0], after[0])
        yield step + 1


def save(engine: Any, out: Path, step: int) -> checkpoint.Checkpoint:
    folder = RunFolder(out)
    return checkpoint.save_checkpoint(engine, folder, recipe(), step, {"seed": 0, "epoch": 0, "clips": 0})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()
    reference, clipped = plain_steps()
    assert 0 < clipped < TOTAL, f"{clipped} steps were clipped; some should be and some not"
    start_processes()
    settings = recipe().optim
    for name in ENGINES:
        deepspeed_json = read_deepspeed_json(ROOT / f"ds_configs/{name}.json")
        engine = build_engine(Small(checkpointed=True), settings, deepspeed_json)
        for step in take_steps(engine, settings, range(TOTAL)):
            if step == SAVED:
                committed = save(engine, options.out / name, step)
                compare(checkpoint.assemble(committed), reference[step - 1], f"{name}, step {step}")
        unbroken = save(engine, options.out / name, TOTAL)
        compare(checkpoint.assemble(unbroken), reference[-1], name)
        state = held_state(engine, "")
        engine.destroy()

        if parallel.world_size() > 1:
            other = Small(checkpointed=True)
            nn.init.zeros_(other.tower[0].weight)  # frozen weights come from the checkpoint too
            engine = build_engine(other, settings, deepspeed_json)
            checkpoint.restore(engine, committed)
            for _ in take_steps(engine, settings, range(SAVED, TOTAL)):
                pass
            resumed = held_state(engine, "")
            assert len(state) == len(resumed) and all(map(torch.equal, state, resumed)), f"{name}: resumed differently"
            engine.destroy()
    parallel.barrier()
    leave(0)


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    start = Small(checkpointed=True).state_dict()
    for name, tensor in expected.items():
        worst = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert worst <= 1e-6, f"{where}, {name}: {worst:.2e}"
        frozen = name.startswith("tower") or ".base_layer." in name
        assert torch.equal(found[name], start[name]) == frozen, f"{where}, {name}"


if __name__ == "__main__":
    main()
