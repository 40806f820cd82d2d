"""The one place that starts DeepSpeed: process group, configuration, engine.

What users should never meet is handled here (measured in DeepSpeed 0.19.8, see docs/engine.md): environment variables
of a launch without launcher, the C++ op that is compiled at the first CPU start and waits for ever on a stale lock,
defaults for clipping and time-outs, options of the JSON that belong to the recipe.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from typing import Any

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

# Of a collective: the watchdog is to speak first, and what it does not watch, such as scoring, needs a limit too.
COLLECTIVE_SECONDS = 1800.0
AFTER_THE_WATCHDOG = 300.0


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
