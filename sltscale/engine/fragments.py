"""Which pieces of which parameter this rank holds, under every ZeRO stage.

DeepSpeed keeps fp32 master weights and optimizer state in flat buffers cut across the ranks, differently for each
stage. Seen from here, all of them are the same thing: a rank holds *fragments*, each a run of consecutive elements of
one named parameter, with the optimizer's state for the same elements. A checkpoint written as fragments can therefore
be read back at any number of ranks and any stage, and no collective is needed to write it.

This is the one file that knows DeepSpeed's inner buffers (read in 0.19.8; tests/multiprocess pins them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sltscale import parallel


@dataclass(frozen=True)
class Fragment:
    """Elements ``start : start + numel`` of the flattened parameter ``name``.

    flat: the tensor that the torch optimizer updates, or that a frozen parameter's weights are in; the fragment lies at
    ``offset`` in it. owned: whether this rank writes it (of what every rank holds, each writes its share).
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int
    owned: bool

    def view(self, flat: Tensor) -> Tensor:
        """The fragment's elements of ``flat`` or of a state tensor of the same shape, as a 1-D view."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a DeepSpeed engine."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def held_fragments(engine: Any) -> Iterator[Fragment]:
    """All fragments of parameters that this rank holds, in a fixed order: first the trained, then the frozen ones."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    frozen = [parameter for parameter in engine.module.parameters() if not parameter.requires_grad]
    stage = engine.zero_optimization_stage()
    if stage == 0:
        trained = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
        yield from _replicated(trained + frozen, names)
    elif stage < 3:
        yield from _partitioned(engine.optimizer, names)
        yield from _replicated(frozen, names)
    else:
        yield from _sharded(engine.optimizer, names)
        yield from _sharded_frozen(frozen, names)


def _replicated(parameters: list[Any], names: dict[int, str]) -> Iterator[Fragment]:
    for number, parameter in enumerate(parameters):
        owned = number % parallel.world_size() == parallel.rank()
        yield Fragment(names[id(parameter)], 0, parameter.numel(), parameter, 0, owned)


def _partitioned(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """Stages 1 and 2: each group is one flat buffer, of which every rank holds a consecutive part."""
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for parameter in parameters:
            if parameter._hp_mapping is not None:
                here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                yield Fragment(names[id(parameter)], here.start, here.numel, flat, there.start, True)


def _sharded(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """Stage 3: every parameter is cut into W equal parts, the last ones padded."""
    for parameters in optimizer.fp16_groups:
        for parameter in parameters:
            group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = parallel.rank() * numel
            real = min(numel, parameter.ds_numel - start)
            if real > 0:
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield Fragment(names[id(parameter)], start, real, flat, offset, True)


def _sharded_frozen(parameters: list[Any], names: dict[int, str]) -> Iterator[Fragment]:
    """Stage 3 cuts parameters that no optimizer has as well, and leaves each part with its parameter."""
    for parameter in parameters:
        numel = parameter.ds_tensor.ds_numel
        start = parallel.rank() * numel
        real = min(numel, parameter.ds_numel - start)
        if real > 0:
            yield Fragment(names[id(parameter)], start, real, parameter.ds_tensor, 0, True)


def parameter_shapes(engine: Any) -> dict[str, list[int]]:
    """Full shapes of all parameters, also where ZeRO-3 has taken them apart."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


def publish_masters(engine: Any) -> None:
    """After the master weights were written to: bring the weights that the model computes with up to date."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        # What DeepSpeedZeroOptimizer_Stage3.step does after the inner optimizer has stepped.
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
            updated = optimizer.unflatten(
                optimizer.fp16_partitioned_groups_flat[group], optimizer.fp16_partitioned_groups[group]
            )
            for partition, values in zip(optimizer.fp16_partitioned_groups[group], updated, strict=True):
                partition.data = values.data
        if optimizer.persistent_parameters:
            # Small parameters that stay gathered hold a full copy, which has to be gathered anew.
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
