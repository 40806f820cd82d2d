"""Started by test_forecast.py: engines of every ZeRO stage take two steps, and what they hold is counted, tensor by
tensor, and compared with the forecast."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import steps_worker
import torch
from torch import Tensor

from sltscale import parallel
from sltscale.config import Recipe
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.text import TextTokenizer, build_corpus_tokenizer
from sltscale.engine.accumulate import accumulate
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.fragments import torch_optimizer
from sltscale.engine.global_loss import global_loss
from sltscale.engine.signals import leave
from sltscale.forecast.states import EngineSetting, Parameters, held
from sltscale.forecast.trace import build_without_memory
from sltscale.methods import export
from sltscale.methods.base import Vocabulary

# A frozen tower, two algorithms, and sizes that no number of ranks divides.
RULES = [
    {"part": "text_encoder", "frozen": True},
    {"part": "visual.frames", "name": "sgd", "lr": 0.1},
    {"part": "visual", "name": "adam"},
]
CPU = {"device": "cpu"}
ZERO: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "stage3_param_persistence_threshold": 40},
    {"stage": 2, "offload_optimizer": CPU},
    {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
]

# Of (micro-batches, place in ZERO, bf16), what "short" keeps: every stage, each kind once.
SHORT = [(False, 0, False), (False, 2, True), (False, 4, True), (True, 1, False), (True, 6, False)]


def total(tensors: Iterable[Any]) -> int:
    """Bytes of their storages, each once."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def leaves(tree: Any) -> Iterator[Tensor]:
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, Tensor):
            yield item
        elif item is not None:
            yield from leaves(item)


def weights(engine: Any) -> list[Any]:
    own = list(engine.module.parameters())
    return [*(p.data for p in own), *(getattr(p, "ds_tensor", None) for p in own)]


def masters(engine: Any) -> list[Tensor]:
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [tensor for name in names for tensor in getattr(engine.optimizer, name, [])]


def gradients(engine: Any) -> list[Any]:
    optimizer = engine.optimizer
    own: list[Any] = [parameter.grad for parameter in engine.module.parameters()]
    if engine.zero_optimization_stage() == 3:
        own.append(optimizer.grad_partitions_flat_buffer)
    for name in ("averaged_gradients", "all_grad_tensors"):
        own += leaves(getattr(optimizer, name, {}))
    return own + [tensor.grad for tensor in masters(engine)]


def backward(engine: Any, recipe: Recipe, plan: Plan, tokenizer: TextTokenizer, step: int) -> None:
    batch = steps_worker.share(plan, step)
    text = engine.module.tokenise(tokenizer.encode, batch, (0, step))
    if recipe.data.micro_frames is None:
        outputs = engine(batch, text)
        engine.backward(global_loss(outputs, engine.module.weights, batch, False)[0])
        return
    parts = batch.split([len(batch) // 2, len(batch) - len(batch) // 2])
    micro = [(part, engine.module.tokenise(tokenizer.encode, part, (0, step))) for part in parts]
    accumulate(engine, micro, [1, 2], torch.device("cpu"))


def compare(recipe: Recipe, deepspeed_json: dict[str, Any], plan: Plan, tokenizer: TextTokenizer) -> None:
    in_parts = recipe.data.micro_frames is not None
    vocabulary = Vocabulary(tokenizer.size, tokenizer.pad_id, tokenizer.eos_id)
    parameters = Parameters.of(build_without_memory(recipe.method, vocabulary), recipe.optim)
    setting = EngineSetting.of(deepspeed_json)
    gpu, cpu = held(parameters, setting, parallel.world_size(), parallel.rank(), micro_batches=in_parts)

    engine = build_engine(export.build(recipe, tokenizer), recipe.optim, deepspeed_json, micro_batches=in_parts)
    engine.train()
    backward(engine, recipe, plan, tokenizer, 0)
    engine.step()
    backward(engine, recipe, plan, tokenizer, 1)
    found = {"gradients": total(gradients(engine))}
    engine.step()
    found |= {
        "parameters": total(weights(engine)),
        "masters": total(masters(engine)),
        "optimizer": total(leaves(torch_optimizer(engine).state.values())),
        "buffers": total(engine.module.buffers()),
    }
    where = f"{deepspeed_json}, micro-batches {in_parts}, rank {parallel.rank()}"
    expected = {name: getattr(gpu, name) + getattr(cpu, name) for name in found}
    assert found == expected, f"{where}: holds {found}, forecast {expected}"
    engine.destroy()


def main() -> None:
    start_processes()
    tokenizer = build_corpus_tokenizer([steps_worker.clip(n)[1] for n in range(steps_worker.CLIPS)], ["de"], 60)
    for micro_frames in (None, 16):
        tree = steps_worker.recipe_for("c2rl", "adamw", 0.0, 0.5, micro_frames=micro_frames).model_dump()
        recipe = Recipe.model_validate(tree | {"optim": tree["optim"] | {"groups": RULES}})
        lengths = [len(steps_worker.clip(number)[0]) for number in range(steps_worker.CLIPS)]
        plan = Plan(lengths, recipe.seed, BatchRule.of(recipe.data))
        for place, zero in enumerate(ZERO):
            if "offload_param" in zero and parallel.world_size() == 1:
                continue  # the one part and the gathered whole are one tensor where both are in the CPU's memory
            for bf16 in (False, True) if zero["stage"] else (False,):
                if "short" in sys.argv and (micro_frames is not None, place, bf16) not in SHORT:
                    continue
                settings = {"zero_optimization": {"reduce_bucket_size": 20000, **zero}, "bf16": {"enabled": bf16}}
                compare(recipe, settings, plan, tokenizer)
    if parallel.rank() == 0:
        print("all equal", flush=True)
    parallel.barrier()


if __name__ == "__main__":
    main()
    leave(0)
