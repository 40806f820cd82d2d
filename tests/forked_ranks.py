"""Ranks of a tiny run as forks of a server that has imported everything: half a second a start instead of ten.

They are real processes with a process group of their own, training with the real engine, loop, run folder and
checkpoints, on the clips of multiprocess/steps_worker.py: 12 steps, a checkpoint after every second.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from launching import free_port

STEPS = 12
# What a rank would import only while it runs.
SLOW_IMPORTS = (
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.original_muon",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
)
WORKERS = Path(__file__).with_name("multiprocess")
sys.path.append(str(WORKERS))


def worker() -> ModuleType:
    """multiprocess/steps_worker.py, whose clips and recipe these runs have."""
    return importlib.import_module("steps_worker")


@dataclass
class Ranks:
    """The processes of one start; ``wait`` for their exit codes."""

    processes: list[ForkServerProcess]
    log: Path

    def wait(self, seconds: float = 600) -> list[int | None]:
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise AssertionError(f"ranks still at work after {seconds} s: {codes}\n{self.output()[-4000:]}")
        return codes

    def output(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@dataclass
class Starter:
    """Starts ranks and ends what is left of them."""

    environment: dict[str, str]
    folder: Path
    started: list[Ranks] = field(default_factory=list)

    def start(self, run: Path, *, ranks: int = 2, fault: str | None = None, **options: Any) -> Ranks:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["forked_ranks", "steps_worker", *SLOW_IMPORTS])
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (Path(__file__).parent, WORKERS)))
        log = self.folder / f"start-{len(self.started)}.log"
        log.touch()
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_PORT": str(free_port())}
        shared |= {"SLTSCALE_FAULT": fault} if fault is not None else {}
        processes = []
        for rank in range(ranks):
            own = self.environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            processes.append(context.Process(target=_be_a_rank, args=(run, own, log, options)))
            processes[-1].start()
        self.started.append(Ranks(processes, log))
        return self.started[-1]

    def check(self, run: Path, **options: Any) -> str:
        ranks = self.start(run, **options)
        codes = ranks.wait()
        assert set(codes) == {0}, ranks.output()[-4000:]
        return ranks.output()

    def end(self) -> None:
        for ranks in self.started:
            ranks.kill()


def _be_a_rank(run: Path, environment: dict[str, str], log: Path, options: dict[str, Any]) -> None:
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from sltscale.engine.checkpoint import NotSavedError
    from sltscale.engine.finite import NonFiniteError
    from sltscale.engine.run_folder import FencedError
    from sltscale.engine.signals import leave
    from sltscale.errors import InputError

    try:
        code = _train(run, **options)
    except Exception as error:
        code = 2 if isinstance(error, InputError) else 1
        if code == 1 and not isinstance(error, NonFiniteError | NotSavedError | FencedError):
            traceback.print_exc()
        print(f"error: {error}", flush=True)
    leave(code)


def _train(
    run: Path,
    *,
    steps: int = STEPS,
    stage: int = 2,
    bf16: bool = False,
    micro_frames: int | None = None,
    optimizer: str = "adamw",
    dropout: float = 0.1,
    train: dict[str, Any] | None = None,
    poison: dict[str, Any] | None = None,
    hang: tuple[int, int] | None = None,
    seconds_per_step: float = 0.0,
    file_limit: int | None = None,
) -> int:
    """What stages.train_stage does about running and saving. poison: see _poison; hang: (rank, step)."""
    import resource
    import time

    from sltscale import config, parallel
    from sltscale.data.batches.batching import BatchRule
    from sltscale.data.batches.plan import Plan
    from sltscale.data.text import build_corpus_tokenizer
    from sltscale.engine import checkpoint, loop, manifest
    from sltscale.engine.deepspeed_engine import build_engine, start_processes
    from sltscale.engine.run_folder import RunFolder
    from sltscale.engine.signals import EXIT_STOPPED, StopRequest
    from sltscale.engine.telemetry import Telemetry
    from sltscale.engine.watchdog import Watchdog
    from sltscale.methods import export

    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    device, steps_worker = start_processes(), worker()
    tree = steps_worker.recipe_for("c2rl", optimizer, dropout, 0.5).model_dump()
    tree["train"] |= {"checkpoint_every": 2} | (train or {})
    tree["data"]["micro_frames"] = micro_frames
    recipe = config.Recipe.model_validate(tree)
    lengths = [len(steps_worker.clip(n)[0]) for n in range(steps_worker.CLIPS)]
    plan = Plan(lengths, recipe.seed, BatchRule.of(recipe.data), micro_frames=micro_frames)
    texts = [steps_worker.clip(number)[1] for number in range(steps_worker.CLIPS)]
    tokenizer = build_corpus_tokenizer(texts, ["de"], 60)
    folder = RunFolder(run)
    settings = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}}
    with Watchdog(recipe.train.watchdog_seconds) as watchdog, StopRequest() as stop:
        method = export.build(recipe, tokenizer).to(device)
        if poison is not None:
            _poison(method, cached=micro_frames is not None, **poison)
        engine = build_engine(method, recipe.optim, settings, micro_batches=micro_frames is not None)
        folder.join(parallel.on_rank_zero(lambda: folder.open(recipe, settings, {}, parallel.world_size())))
        watchdog.folder = folder
        parallel.on_rank_zero(lambda: tokenizer.save(folder.tokenizer))
        latest, complaints = parallel.on_rank_zero(lambda: checkpoint.latest_checkpoint(folder.checkpoints))
        first_step = 0
        if latest is not None:
            manifest.check_recipe(latest, recipe)
            checkpoint.restore(engine, latest)
            first_step = latest.step
        telemetry = Telemetry("tiny", folder if parallel.rank() == 0 else None, first_step, STEPS)
        for complaint in complaints:
            telemetry.say(f"warning: {complaint}; going on from an earlier one")
        telemetry.say(f"going on from step {first_step}")

        def batches() -> Any:
            for step in range(first_step, steps):
                time.sleep(seconds_per_step)
                while hang == (parallel.rank(), step):
                    time.sleep(1)
                yield step, steps_worker.share(plan, step)

        done = loop.train(
            engine,
            recipe,
            plan,
            batches(),
            tokenizer,
            folder=folder,
            telemetry=telemetry,
            first_step=first_step,
            device=device,
            stop=stop,
            watchdog=watchdog,
            seconds_before=0.0,
            evaluate=lambda committed: None,
        )
        telemetry.close()
        parallel.barrier()
    return 0 if done == steps else EXIT_STOPPED


def _poison(method: Any, *, clips: list[str], gradient: bool, times: int, cached: bool) -> None:
    """NaN in what the first convolution makes of ``clips``, or in the gradient of what the second one does, in the
    first ``times`` steps of this rank that they come in. cached: clips are encoded twice, once without gradient."""
    import torch

    current: dict[str, Any] = {"seen": 0}
    convolutions = [module for module in method.modules() if isinstance(module, torch.nn.Conv2d)]

    def enter(_: Any, arguments: Any) -> None:
        current["batch"] = arguments[0]

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        batch = current["batch"]
        rows = [row for row, clip in enumerate(batch.ids) if clip in clips]
        if not rows:
            return output
        if not gradient or output.requires_grad:
            current["seen"] += 1
        # each step is taken twice, once more to find the culprit; with micro-batches the loss is too
        if current["seen"] > 2 * times * (1 + (cached and not gradient)):
            return output
        factor = torch.ones(len(output), 1, 1, 1)
        for row in rows:
            start, end = batch.frames.cu_seqlens[row : row + 2].tolist()
            factor[start:end] = float("nan")
        if not gradient:
            return output * factor.to(output.dtype)
        if output.requires_grad:
            output.register_hook(lambda g: g * factor.to(g.dtype))
        return output

    method.register_forward_pre_hook(enter)
    convolutions[gradient].register_forward_hook(spoil)


def race(runs: list[Path], barrier: Any, outcomes: Any) -> None:
    """Open each folder at the same instant as another process does; it is held until both have tried."""
    from sltscale.engine.run_folder import RunFolder
    from sltscale.errors import InputError

    recipe = worker().recipe_for("c2rl", "adamw", 0.0, 0.5)
    for run in runs:
        folder = RunFolder(run)
        barrier.wait()
        try:
            folder.open(recipe, {}, {}, 1)
            outcome = "opened"
        except InputError as error:
            outcome = str(error)[str(error).index("in use") :]
        barrier.wait()
        outcomes.put((run, outcome))
        folder.close()
