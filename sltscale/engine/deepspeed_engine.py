"""The one place that starts DeepSpeed: process group, configuration, engine.

What users should never meet is handled here (measured in DeepSpeed 0.19.8, see docs/engine.md): environment variables
of a launch without launcher, the C++ op that is compiled at the first CPU start and waits for ever on a stale lock,
defaults for clipping and time-outs, options of the JSON that belong to the recipe.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.groups import _clone_world_group as clone_world_group
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout

from sltscale import launching
from sltscale.config import OptimSettings
from sltscale.engine import rendezvous
from sltscale.engine.optim import build_optimizer
from sltscale.engine.rendezvous import LIMIT_SECONDS
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
# Of a collective: the watchdog is to speak first, and what it does not watch, such as scoring, needs a limit too.
COLLECTIVE_SECONDS = 1800.0
AFTER_THE_WATCHDOG = 300.0


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


def start_processes(rendezvous_seconds: float = LIMIT_SECONDS, watchdog_seconds: float = 0.0) -> torch.device:
    """Join the process group of the launcher, or form one of a single process; returns this rank's device.

    Collectives time out later than a watchdog of ``watchdog_seconds`` speaks.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    place = launching.here()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Gloo does the same work; the op would need a compiler and half a minute at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        cpus = len(os.sched_getaffinity(0)) // place.local_world_size
        torch.set_num_threads(max(1, min(cpus, place.cpus or cpus)))
    else:
        if place.local_rank >= accelerator.device_count():
            raise InputError(
                f"rank {place.rank} is the {place.local_rank + 1}th of its node, but sees {accelerator.device_count()} "
                "GPUs; start as many processes as GPUs on each node, and let each see all of them"
            )
        accelerator.set_device(place.local_rank)
    store = rendezvous.meet(place, rendezvous_seconds)
    limit = datetime.timedelta(seconds=max(COLLECTIVE_SECONDS, watchdog_seconds + AFTER_THE_WATCHDOG))
    try:
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo",
            auto_mpi_discovery=False,
            timeout=limit,
            verbose=False,
        )
    except dist.DistNetworkError as error:
        raise InputError(f"no process group at {place.address}:{place.port}: {str(error).splitlines()[0]}") from None
    del store
    # The engine's collectives run in a clone of the group, to which DeepSpeed gives torch's limits (NCCL: 10 minutes).
    set_group_timeout(limit, clone_world_group())
    return torch.device(accelerator.current_device_name())


def leave(code: int) -> NoReturn:
    """End this process at once with that exit code.

    Nothing is left to do when a rank is done, but tearing down gloo's and DeepSpeed's threads now and then ends in
    SIGABRT ("terminate called without an active exception", seen once in some 60 launches although the process group
    was destroyed), and the launcher would report a finished run as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def build_engine(
    model: nn.Module, settings: OptimSettings, deepspeed_json: dict[str, Any], *, micro_batches: bool = False
) -> Any:
    """A DeepSpeed engine around ``model`` whose ``step`` applies the mean over ranks of their gradients.

    micro_batches: ``backward`` is called more than once before ``step``.
    """
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, settings),
        config={
            **deepspeed_json,
            # Global batches come from the plan; DeepSpeed insists on a number and multiplies nothing with this one.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # With several micro-batches: sum their gradients, reduce and scale nothing before the step.
            "managed_gradient_accumulation": not micro_batches,
            "gradient_clipping": settings.clip_norm or 0.0,  # its own default is 1.0
            "zero_allow_untested_optimizer": True,  # ours in stages 1-3
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeedCPUAdam would need a compiler
            "steps_per_print": 10**9,
        },
    )
    return engine
