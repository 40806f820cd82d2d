"""The settings that a DeepSpeed JSON may hold: those of the engine. No DeepSpeed here: faults are told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sltscale.errors import InputError
from sltscale.recipe_files import nearest

OWNED_BY_RECIPE = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.global_batch",
    "gradient_accumulation_steps": "data.global_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}
ENGINE_KEYS = (
    *("zero_optimization", "bf16", "communication_data_type", "wall_clock_breakdown", "memory_breakdown"),
    *("comms_logger", "flops_profiler"),
)


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The engine settings; InputError if the file is missing, no JSON, or sets what the engine does not own."""
    if not path.is_file():
        raise InputError(f"DeepSpeed configuration {path} does not exist; see ds_configs/ for complete ones")
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"DeepSpeed configuration {path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"DeepSpeed configuration {path} holds no JSON object")
    for key in settings:
        if key in OWNED_BY_RECIPE:
            raise InputError(
                f"{path} sets {key}, which belongs to the recipe; remove it there and set {OWNED_BY_RECIPE[key]}"
            )
        if key not in ENGINE_KEYS:
            raise InputError(f"{path} sets {key}; {nearest(key, ENGINE_KEYS)}")
    zero, bf16 = settings.get("zero_optimization", {}), settings.get("bf16", {})
    if not isinstance(zero, dict) or not isinstance(bf16, dict):
        raise InputError(f"{path}: zero_optimization and bf16 must be JSON objects")
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise InputError(f"{path}: zero_optimization.stage is {zero['stage']!r}; expected 0, 1, 2 or 3")
    _check_offload(path, zero)
    for part, key, value in (
        ("zero_optimization", "compute_grad_norm", zero.get("compute_grad_norm", True)),
        ("bf16", "check_grad_overflow", bf16.get("check_grad_overflow", True)),
    ):
        if value is not True:
            raise InputError(f"{path} sets {part}.{key} to {value!r}; it is what finds steps that are not finite")
    if bf16.get("enabled") and zero.get("stage", 0) == 0:
        raise InputError(f"{path} enables bf16 at ZeRO stage 0, which keeps no fp32 weights; use stage 1, 2 or 3")
    return settings


def _check_offload(path: Path, zero: dict[str, Any]) -> None:
    """To the CPU's memory only: to disks, and in DeepSpeed's other ways, was not tried."""
    stages = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
    for key in (key for key in zero if "offload" in key):
        if key not in stages:
            raise InputError(f"{path} sets zero_optimization.{key}; {nearest(key, list(stages))}")
        if zero.get("stage", 0) not in stages[key]:
            wanted = " or ".join(map(str, stages[key]))
            raise InputError(f"{path}: {key} at ZeRO stage {zero.get('stage', 0)}; it needs stage {wanted}")
        where = zero[key]
        known = isinstance(where, dict) and where.keys() <= {"device", "pin_memory"}
        if not known or where.get("device") != "cpu":
            raise InputError(
                f'{path}: zero_optimization.{key} is {json.dumps(where)}; expected {{"device": "cpu"}}, '
                "with pin_memory if you like"
            )
