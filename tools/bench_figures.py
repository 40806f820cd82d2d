"""What bench_train.py's processes are told, and what they give back."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Literal

from sltscale import config


@dataclass(frozen=True)
class Work:
    """recipe: complete, with shards that hold the clips. vocabulary: token ids of the model. stage: of ZeRO. decode:
    beam search instead of training steps. without: see bench_train.py."""

    recipe: config.Recipe
    vocabulary: int
    precision: Literal["fp32", "bf16"]
    stage: int
    steps: int
    threads: int
    decode: bool = False
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """seconds: of every step; cpu_seconds: of this process's threads in it (less than threads times seconds where
    other work keeps the processors busy). ledger: seconds by account, of ledger_seconds in all. peak_flops: measured, a
    second. memory_gib: see bench_train.py. result: the losses of all steps, or the tokens of each sentence. padding:
    share of frames, if clips were padded to the longest."""

    device: str
    parameters: int
    clips: int
    frames: int
    padding: float
    seconds: list[float]
    cpu_seconds: list[float]
    ledger: dict[str, float]
    ledger_seconds: float
    flops: int
    peak_flops: float
    memory_gib: float
    result: list[float] = field(default_factory=list)

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)

    @property
    def mfu(self) -> float:
        return self.flops / self.step / self.peak_flops
