"""What a rank's engine holds between steps: bytes of weights, gradients and optimizer state under every ZeRO stage.

Follows what DeepSpeed 0.19.8 allocates (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py, parameter_offload.py), not
the formulas of its papers: partitions are padded, small parameters stay whole at stage 3, gradients come as tensors.
tests/multiprocess/test_forecast.py counts an engine's tensors against it, byte for byte.

Letters: W ranks, n elements of a parameter or group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sltscale.config import OptimSettings
from sltscale.engine.optim import freeze, parameter_groups

FULL, HALF = 4, 2  # bytes of an element in fp32 and bf16
ALIGNED = 2  # elements; stages 1 and 2 pad a group to a multiple of so many times W
STATES = {"sgd": 1, "adam": 2, "adamw": 2}  # elements of optimizer state for each trained one
COUNTER = 4  # bytes: Adam's number of steps, one for each tensor that it updates


@dataclass(frozen=True)
class Group:
    """Parameters with one optimizer rule. sizes: elements of each, in order."""

    algorithm: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Parameters:
    """trained: groups as the optimizer has them. frozen: elements of each. buffers: bytes."""

    trained: tuple[Group, ...]
    frozen: tuple[int, ...]
    buffers: int

    @classmethod
    def of(cls, model: nn.Module, settings: OptimSettings) -> Parameters:
        """Those of a model, which may be without memory (on the meta device); freezes what the rules freeze."""
        freeze(model, settings)
        groups = parameter_groups(model, settings)
        return cls(
            tuple(Group(group["algorithm"], tuple(p.numel() for p in group["params"])) for group in groups),
            tuple(p.numel() for p in model.parameters() if not p.requires_grad),
            sum(buffer.nbytes for buffer in model.buffers()),
        )

    def numel(self) -> int:
        return self.trained_numel() + sum(self.frozen)

    def trained_numel(self) -> int:
        return sum(sum(group.sizes) for group in self.trained)


@dataclass(frozen=True)
class EngineSetting:
    """What of a DeepSpeed configuration decides about memory. bucket, persistent: elements, see DeepSpeed's
    reduce_bucket_size and stage3_param_persistence_threshold. buckets: buffers of a bucket's size."""

    stage: int = 0
    bf16: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 500_000_000
    buckets: int = 1
    persistent: int = 100_000
    live: int = 1_000_000_000

    @classmethod
    def of(cls, deepspeed_json: dict[str, Any]) -> EngineSetting:
        """Of settings that ``read_deepspeed_json`` has accepted."""
        zero = deepspeed_json.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        contiguous, overlapping = zero.get("contiguous_gradients", True), zero.get("overlap_comm", stage == 3)
        return cls(
            stage=stage,
            bf16=bool(deepspeed_json.get("bf16", {}).get("enabled", False)),
            offload_optimizer="offload_optimizer" in zero,
            offload_parameters="offload_param" in zero,
            bucket=int(zero.get("reduce_bucket_size", cls.bucket)),
            buckets=0 if not contiguous else 2 if overlapping and stage in (1, 2) else 1,
            persistent=int(zero.get("stage3_param_persistence_threshold", cls.persistent)),
            live=int(zero.get("stage3_max_live_parameters", cls.live)),
        )

    def at(self, stage: int, offload: bool = False) -> EngineSetting:
        """The same at another stage; fp32 at stage 0, which has no bf16. offload: as ds_configs/zeroN_offload.json."""
        return dataclasses.replace(
            self,
            stage=stage,
            bf16=self.bf16 and stage > 0,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
        )

    @property
    def element(self) -> int:
        """Bytes of a weight that the model computes with."""
        return HALF if self.bf16 else FULL

    @property
    def title(self) -> str:
        offload = self.offload_optimizer or self.offload_parameters
        return f"ZeRO {self.stage}{' bf16' if self.bf16 else ''}{' offload' if offload else ''}"


@dataclass(frozen=True)
class Held:
    """Bytes on one device. parameters: weights that the model computes with, between two steps. masters: the fp32
    copies that the optimizer updates. gradients: at the end of a step's last backward. optimizer: momentum, Adam's
    moments. buffers: of the model. communication: what gradients and weights travel in, while a backward lasts."""

    parameters: int = 0
    masters: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    communication: int = 0

    def total(self) -> int:
        return sum(dataclasses.asdict(self).values())


def held(
    parameters: Parameters, engine: EngineSetting, world_size: int, rank: int, *, micro_batches: bool = False
) -> tuple[Held, Held]:
    """(on the GPU, in the CPU's memory) of one rank, after its first step. micro_batches: several to a step."""
    if engine.stage == 0:
        return _replicated(parameters, engine), Held()
    if engine.stage < 3:
        return _partitioned(parameters, engine, world_size, rank, micro_batches)
    return _sharded(parameters, engine, world_size)


def most_held(
    parameters: Parameters, engine: EngineSetting, world_size: int, *, micro_batches: bool = False
) -> tuple[Held, Held]:
    """Of the rank that holds most; ranks differ by whole gradients at the edges of their partitions."""
    ranks = range(world_size) if engine.stage in (1, 2) else range(1)
    every = (held(parameters, engine, world_size, rank, micro_batches=micro_batches) for rank in ranks)
    return max(every, key=lambda pair: pair[0].total())


def _replicated(parameters: Parameters, engine: EngineSetting) -> Held:
    trained = parameters.trained_numel()
    counters = sum(COUNTER * len(group.sizes) for group in parameters.trained if group.algorithm != "sgd")
    return Held(
        parameters=FULL * parameters.numel(),
        gradients=FULL * trained,
        optimizer=sum(FULL * STATES[group.algorithm] * sum(group.sizes) for group in parameters.trained) + counters,
        buffers=parameters.buffers,
        communication=FULL * min(trained, engine.bucket),
    )


def _partitioned(
    parameters: Parameters, engine: EngineSetting, world_size: int, rank: int, micro_batches: bool
) -> tuple[Held, Held]:
    """Each group is one flat buffer, padded, of which every rank owns a consecutive part."""
    element = engine.element
    padded = [_padded(sum(group.sizes), ALIGNED * world_size) for group in parameters.trained]
    parts = [size // world_size for size in padded]
    gpu = Held(
        parameters=element * (sum(padded) + sum(parameters.frozen)),
        buffers=parameters.buffers,
        communication=element * engine.bucket * engine.buckets,
    )
    masters, optimizer = FULL * sum(parts), _optimizer(parameters, parts)
    if engine.offload_optimizer:
        largest = max(size for group in parameters.trained for size in group.sizes)
        on_gpu = dataclasses.replace(gpu, communication=gpu.communication + element * largest)
        # The weights' part that is updated, and a buffer for the largest gradient on its way.
        staging = element * sum(parts) + element * largest
        return on_gpu, Held(masters=masters, gradients=masters, optimizer=optimizer, communication=staging)
    if engine.stage == 1 and micro_batches:
        gradients = parameters.trained_numel()
    else:
        own = zip(parameters.trained, parts, strict=True)
        gradients = sum(_touched(group.sizes, part, rank, padding=not micro_batches) for group, part in own)
    return dataclasses.replace(gpu, masters=masters, gradients=element * gradients, optimizer=optimizer), Held()


def _touched(sizes: Sequence[int], part: int, rank: int, *, padding: bool) -> int:
    """Elements of the gradients that reach into a rank's part of a group; whole tensors, of which it uses a piece."""
    begin, end = rank * part, (rank + 1) * part
    elements = start = 0
    for size in sizes:
        if start < end and start + size > begin:
            elements += size
        start += size
    return elements + (max(0, end - max(begin, start)) if padding else 0)


def _sharded(parameters: Parameters, engine: EngineSetting, world_size: int) -> tuple[Held, Held]:
    """Every parameter is cut into W equal parts, the last one padded; small ones are kept whole beside that."""
    element = engine.element
    parts = [sum(-(-size // world_size) for size in group.sizes) for group in parameters.trained]
    every = [*(size for group in parameters.trained for size in group.sizes), *parameters.frozen]
    weights = element * sum(-(-size // world_size) for size in every)
    whole = element * sum(-(-size // world_size) * world_size for size in every if size <= engine.persistent)
    gathered = element * min(engine.live, sum(size for size in every if size > engine.persistent))
    if world_size == 1 and not engine.offload_parameters:
        whole = gathered = 0  # the one part is the whole
    gradients, masters, optimizer = element * sum(parts), FULL * sum(parts), _optimizer(parameters, parts)
    bucket = element * engine.bucket * engine.buckets
    gpu = Held(parameters=whole, buffers=parameters.buffers, communication=bucket + gathered)
    cpu = Held()
    if engine.offload_parameters:
        cpu = dataclasses.replace(cpu, parameters=weights)
    else:
        gpu = dataclasses.replace(gpu, parameters=whole + weights)
    if engine.offload_optimizer:  # in both precisions: as they arrive, and as the optimizer takes them
        cpu = dataclasses.replace(cpu, masters=masters, gradients=gradients + masters, optimizer=optimizer)
    else:
        gpu = dataclasses.replace(gpu, masters=masters, gradients=gradients, optimizer=optimizer)
    return gpu, cpu


def _optimizer(parameters: Parameters, parts: Sequence[int]) -> int:
    """Of flat parts, one for each group."""
    own = list(zip(parameters.trained, parts, strict=True))
    counters = sum(COUNTER for group, _ in own if group.algorithm != "sgd")
    return sum(FULL * STATES[group.algorithm] * part for group, part in own) + counters


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
