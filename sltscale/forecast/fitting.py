"""Whether a recipe fits into a GPU's memory, at every ZeRO stage and with every way of keeping activations; what would.

The peak is taken to be in the backward, or in the optimizer's step; what CUDA, NCCL and the allocator's gaps take
beside tensors is set aside (RESERVED).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sltscale.config import Recipe
from sltscale.forecast.states import EngineSetting, Held, Parameters, most_held
from sltscale.forecast.trace import Activations, Share, build_without_memory, trace
from sltscale.forecast.workload import Corpus, busiest_share
from sltscale.methods.base import Vocabulary

RESERVED = 1_500_000_000
POLICIES = ("none", "all")
SWITCH = "checkpoint_activations"


@dataclass(frozen=True)
class Case:
    """One setting and what it takes. policy: which towers have checkpoint_activations: "none", "all" or, if the recipe
    has some, "recipe". changes: to the recipe, as its command line takes them."""

    engine: EngineSetting
    policy: str
    changes: tuple[str, ...]
    gpu: Held
    cpu: Held
    activations: Activations
    peak: int
    fits: bool

    @property
    def deepspeed_file(self) -> str:
        offload = "_offload" if self.engine.offload_optimizer else ""
        return f"ds_configs/zero{self.engine.stage}{offload}.json"


class Fitting:
    """The cases of one recipe on so many ranks, each worked out when it is asked for.

    memory: bytes of a GPU. engine: what a DeepSpeed configuration sets beside the stage.
    """

    def __init__(
        self,
        recipe: Recipe,
        vocabulary: Vocabulary,
        corpus: Corpus,
        world_size: int,
        memory: int,
        engine: EngineSetting,
    ) -> None:
        self.recipe, self.vocabulary, self.corpus = recipe, vocabulary, corpus
        self.world_size, self.memory, self.engine = world_size, memory, engine
        method = build_without_memory(recipe.method, vocabulary, stored_tokens=recipe.data.features is not None)
        self.parameters = Parameters.of(method, recipe.optim)
        self.towers = towers(recipe)
        on = [tower for tower, checkpointed in self.towers.items() if checkpointed]
        self.own_policy = "none" if not on else "all" if len(on) == len(self.towers) else "recipe"
        self._traced: dict[tuple[str, bool, int | None, int | None], Activations] = {}
        self._shares: dict[tuple[int | None, int | None], tuple[Share, tuple[int, ...]]] = {}

    def share(self) -> Share:
        return self._share(self.recipe)[0]

    def case(
        self, engine: EngineSetting, policy: str, micro_frames: int | None = None, global_batch: int | None = None
    ) -> Case:
        """micro_frames, global_batch: in place of the recipe's own."""
        changes: list[str] = []
        recipe = self.recipe
        if policy != self.own_policy:
            recipe = with_checkpoints(recipe, policy)
            wanted = "true" if policy == "all" else "false"
            changes += [f"--method.{tower}.{SWITCH} {wanted}" for tower in self.towers]
        for name, value in (("micro_frames", micro_frames), ("global_batch", global_batch)):
            if value is not None:
                recipe = _with(recipe, name, value)
                changes.append(f"--data.{name} {value}")
        activations = self._activations(recipe, policy, engine.bf16)
        in_parts = recipe.data.micro_frames is not None
        gpu, cpu = most_held(self.parameters, engine, self.world_size, micro_batches=in_parts)
        peak = _peak(gpu, activations, engine, self.parameters, in_parts)
        fits = peak + RESERVED <= self.memory
        return Case(engine, policy, tuple(changes), gpu, cpu, activations, peak, fits)

    def cases(self) -> list[Case]:
        """Every stage, with and without offload, with every policy; the batch as the recipe has it."""
        policies = dict.fromkeys((self.own_policy, *POLICIES))
        return [self.case(engine, policy) for policy in policies for engine in self._engines()]

    def nearest(self) -> Case | None:
        """The first that fits, going from what changes least: a higher stage, checkpointed blocks, offload, smaller
        micro-batches, smaller global batches; None if nothing does."""
        for case in self._in_order():
            if case.fits:
                return case
        return None

    def _in_order(self) -> Iterator[Case]:
        higher = [engine for engine in self._engines() if engine.stage >= self.engine.stage]
        plain = [engine for engine in higher if not engine.offload_optimizer]
        for engines in (plain, [engine for engine in higher if engine.offload_optimizer]):
            for policy in dict.fromkeys((self.own_policy, "all")):
                yield from (self.case(engine, policy) for engine in engines)
        last = (self.engine.at(3), self.engine.at(3, offload=True))
        longest = 2 * self.recipe.data.max_frames
        frames = sum(self.share().frames) // 2
        while frames >= longest:
            yield from (self.case(engine, "all", micro_frames=frames) for engine in (plain[0], *last))
            frames = frames // 2 if frames == longest else max(longest, frames // 2)
        clips = (self.recipe.data.global_batch or 0) // 2
        while clips >= self.world_size:
            yield from (self.case(engine, "all", global_batch=clips) for engine in last)
            clips //= 2

    def _engines(self) -> list[EngineSetting]:
        plain = [self.engine.at(stage) for stage in range(4)]
        return [*plain[:3], self.engine.at(2, offload=True), plain[3], self.engine.at(3, offload=True)]

    def _activations(self, recipe: Recipe, policy: str, bf16: bool) -> Activations:
        key = (policy, bf16, recipe.data.micro_frames, recipe.data.global_batch)
        if key not in self._traced:
            share, parts = self._share(recipe)
            self._traced[key] = trace(
                recipe,
                self.vocabulary,
                share,
                world_size=self.world_size,
                bf16=bf16,
                micro_batches=None if recipe.data.micro_frames is None else parts,
                fused=True,
            )
        return self._traced[key]

    def _share(self, recipe: Recipe) -> tuple[Share, tuple[int, ...]]:
        key = (recipe.data.micro_frames, recipe.data.global_batch)
        if key not in self._shares:
            self._shares[key] = busiest_share(self.corpus, recipe, self.world_size)
        return self._shares[key]


def towers(recipe: Recipe) -> dict[str, bool]:
    """The method's towers whose blocks can be checkpointed, by their settings' names, and whether they are."""
    found: dict[str, bool] = {}

    def look(tree: Any, path: Sequence[str]) -> None:
        if isinstance(tree, dict):
            if SWITCH in tree:
                found[".".join(path)] = tree[SWITCH]
            for name, branch in tree.items():
                look(branch, [*path, name])

    look(recipe.method.model_dump(), [])
    return found


def with_checkpoints(recipe: Recipe, policy: str) -> Recipe:
    """The recipe with the blocks of all towers checkpointed, or of none; nothing offloaded to the CPU."""

    def change(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        changed = {name: change(branch) for name, branch in tree.items()}
        return changed | {SWITCH: policy == "all", "offload_activations": False} if SWITCH in tree else changed

    tree = recipe.model_dump()
    return Recipe.model_validate(tree | {"method": change(tree["method"])})


def _with(recipe: Recipe, name: str, value: int) -> Recipe:
    tree = recipe.model_dump()
    return Recipe.model_validate(tree | {"data": tree["data"] | {name: value}})


def _peak(gpu: Held, activations: Activations, engine: EngineSetting, parameters: Parameters, in_parts: bool) -> int:
    kept = gpu.parameters + gpu.masters + gpu.optimizer + gpu.buffers
    whole = engine.element * parameters.trained_numel()
    growth = activations.peak_with_gradients - activations.peak
    if engine.stage == 0:
        backward = max(activations.peak_with_gradients, gpu.gradients + gpu.communication)
    elif engine.stage == 1 and not engine.offload_optimizer:  # gradients are let go at the backward's end only
        backward = gpu.communication + activations.peak_with_gradients
    elif engine.stage == 3 or in_parts:
        backward = gpu.communication + gpu.gradients + activations.peak
    else:  # of the gradients that there are, the share that this rank keeps
        backward = gpu.communication + activations.peak + round(growth * min(1.0, gpu.gradients / max(1, whole)))
    # The optimizer takes gradients in fp32, and foreach kernels need as much again for a moment.
    step = gpu.gradients + 2 * gpu.masters
    return kept + max(backward, step)
