"""What bench_train.py's processes do: steps of the training loop itself, or decoding, and what they measure of it."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_baseline import Baseline
from bench_figures import Figures, Work
from bench_ledger import Ledger
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sltscale import config
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import evaluation_batches, stream
from sltscale.data.shards.index import open_index
from sltscale.data.text import TextTokenizer, build_corpus_tokenizer
from sltscale.engine import loop
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.finite import FiniteSteps
from sltscale.engine.fragments import torch_optimizer
from sltscale.engine.global_loss import Totals
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.signals import StopRequest
from sltscale.engine.telemetry import Telemetry
from sltscale.engine.watchdog import Watchdog
from sltscale.errors import InputError
from sltscale.methods.attention import set_attention
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.models.frames import FrameEncoder
from sltscale.models.translator import Translator
from sltscale.structures import TextBatch, VideoBatch

WARM_UP = 2  # steps: in the first, memory is touched for the first time; the last counts operations
LOSSES = ("clip_loss", "clcl_pair_loss", "label_smoothed_cross_entropy", "pseudo_gloss_loss")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(work: Work) -> Figures:
    """To be called in a process of its own. InputError for a method that needs more than clips and sentences."""
    method, clips, tokenizer, device = _prepare(work)
    if "channels_last" in work.without:
        for module in method.modules():
            if isinstance(module, FrameEncoder):
                module.memory_format = torch.contiguous_format
    return (_decode if work.decode else _train)(work, method, clips, tokenizer, device)


def measure_baseline(work: Work) -> Figures:
    """The same work as the field's code does it, loading apart; to be called in a process of its own."""
    method, clips, tokenizer, device = _prepare(work)
    baseline = Baseline(method.to(device), work.recipe.optim)
    batch = next(evaluation_batches(clips, work.recipe.data, [list(range(len(clips)))])).to(device)
    images, lengths = baseline.images(batch.frames)
    results: list[float] = []
    if work.decode:
        method.eval()
        languages = _language_ids(tokenizer, batch, device)
        settings = work.recipe.evaluation

        def take() -> None:
            written = baseline.translate(images, lengths, languages, settings.beams, settings.max_new_tokens)
            results[:] = [len(row) for row in written]
    else:
        method.train()
        text = tokenizer.encode(batch.texts, batch.languages).to(device)

        def take() -> None:
            results.append(baseline.step(images, lengths, text))

    seconds, cpu_seconds = [], []
    for _ in range(WARM_UP + work.steps):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        take()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
        cpu_seconds.append(time.process_time() - cpu_begun)
    return Figures(
        device=_name(device),
        parameters=sum(parameter.numel() for parameter in method.parameters()),
        clips=len(clips),
        frames=int(sum(clips.frames)),
        padding=0.0,
        seconds=seconds[WARM_UP:],
        cpu_seconds=cpu_seconds[WARM_UP:],
        ledger={},
        ledger_seconds=0.0,
        flops=0,
        peak_flops=1.0,
        memory_gib=peak_memory_gib(device),
        result=results,
    )


def _prepare(work: Work) -> tuple[Method, Selection, TextTokenizer, torch.device]:
    if isinstance(work.recipe.method, config.HFAPretrainingSettings):
        raise InputError(f"recipe {work.recipe.name} needs a lexicon, which drawn clips have none of; take another one")
    device = start_processes()
    torch.set_num_threads(work.threads)
    clips = Selection([open_index(Path(work.recipe.data.shards), "train")])
    tokenizer = build_corpus_tokenizer(clips.texts(), clips.languages(), work.vocabulary)
    torch.manual_seed(work.recipe.seed)
    method = build_method(work.recipe.method, Vocabulary(work.vocabulary, tokenizer.pad_id, tokenizer.eos_id))
    return method, clips, tokenizer, device


class _Losses(Telemetry):
    """Hears of every step."""

    def __init__(self) -> None:
        super().__init__("bench", None, 0, 0)
        self.found: list[float] = []

    def step(self, step: int, totals: Totals, lr: float, *, clips: int, waited: float) -> None:
        self.found.append(totals.losses["loss"])


def _train(work: Work, method: Method, clips: Selection, tokenizer: TextTokenizer, device: torch.device) -> Figures:
    recipe = work.recipe
    parameters = sum(parameter.numel() for parameter in method.parameters())
    peak = peak_flops(device, DTYPES[work.precision])
    settings: dict[str, Any] = {"zero_optimization": {"stage": work.stage}}
    if work.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    ledger = Ledger(partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None)
    ledger.watch(FiniteSteps, "_drop_bad_gradients", "norm, clipping")  # before it is handed on as a hook
    micro_batches = recipe.data.micro_frames is not None
    set_attention(recipe, method, device, DTYPES[work.precision])
    engine = build_engine(method.to(device), recipe.optim, settings, micro_batches=micro_batches)
    _watch_training(ledger, engine, method)
    plan = Plan(clips.frames, recipe.seed, BatchRule.of(recipe.data), micro_frames=recipe.data.micro_frames)
    counter = FlopCounterMode(display=False)
    clock = _Clock(ledger, counter, work.steps, device)
    telemetry = _Losses()
    batches = stream(
        clips, plan, recipe.data, seed=recipe.seed, rank=0, world_size=1, first_step=0, last_step=clock.total
    )
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            engine,
            recipe,
            plan,
            clock.timed(batches),
            tokenizer,
            folder=RunFolder(Path(folder)),
            telemetry=telemetry,
            first_step=0,
            device=device,
            stop=StopRequest(),
            watchdog=Watchdog(recipe.train.watchdog_seconds),
            seconds_before=0.0,
            evaluate=lambda committed: None,
        )
    return Figures(
        device=_name(device),
        parameters=parameters,
        clips=len(clips),
        frames=int(sum(clips.frames)),
        padding=plan.padding_and_imbalance(0, 1).padding,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        ledger=ledger.seconds,
        ledger_seconds=clock.ledger_seconds,
        flops=counter.get_total_flops(),
        peak_flops=peak,
        memory_gib=peak_memory_gib(device),
        result=telemetry.found,
    )


class _Clock:
    """Hands the loop its batches and looks at the time. A step lasts from one request for a batch to the next.

    First the warm-up, then the timed steps; the ledger is open meanwhile on a CPU, and on a GPU, where it has to wait
    for the device at every border, in as many steps after them.
    """

    def __init__(self, ledger: Ledger, counter: FlopCounterMode, steps: int, device: torch.device) -> None:
        self.ledger, self.counter, self.device = ledger, counter, device
        self.end = WARM_UP + steps
        self.total = self.end + (steps if device.type == "cuda" else 0)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.ledger_seconds = 0.0

    def timed(self, batches: Iterator[tuple[int, VideoBatch]]) -> Iterator[tuple[int, VideoBatch]]:
        begun = opened = time.perf_counter()
        cpu_begun = time.process_time()
        for step in range(self.total):
            if step == self.total - (self.end - WARM_UP):
                self.ledger.start()
                opened = time.perf_counter()
            self.ledger.enter("data wait")
            batch = next(batches)
            self.ledger.leave()
            counting: AbstractContextManager[Any] = self.counter if step == WARM_UP - 1 else nullcontext()
            with counting:
                yield batch
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now, cpu_now = time.perf_counter(), time.process_time()
            if WARM_UP <= step < self.end:
                self.seconds.append(now - begun)
                self.cpu_seconds.append(cpu_now - cpu_begun)
            begun, cpu_begun = now, cpu_now
        self.ledger.stop()
        self.ledger_seconds = time.perf_counter() - opened


def _watch_training(ledger: Ledger, engine: Any, method: Method) -> None:
    for batch in (VideoBatch, TextBatch):
        ledger.watch(batch, "to", "host to device")
    ledger.watch_module(method, "forward rest")
    for name, tower in towers(method):
        ledger.watch_module(tower, f"forward {name}")
    for name in LOSSES:
        if hasattr(sys.modules[type(method).__module__], name):
            ledger.watch(sys.modules[type(method).__module__], name, "loss")
    ledger.watch(loop, "global_loss", "loss")
    ledger.watch(engine, "backward", "backward")
    ledger.watch(engine, "step", "norm, clipping")
    ledger.watch(torch_optimizer(engine), "step", "optimizer")


def towers(module: nn.Module, prefix: str = "", depth: int = 2) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model that its forward time is told apart by: modules down to ``depth`` with parameters."""
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield prefix + name, child
            if depth > 1:
                yield from towers(child, f"{prefix}{name}.", depth - 1)


def _decode(work: Work, method: Method, clips: Selection, tokenizer: TextTokenizer, device: torch.device) -> Figures:
    if not isinstance(method, Translator):
        raise InputError(f"recipe {work.recipe.name} does not translate; take one that does, e.g. gfslt_slt")
    dtype = DTYPES[work.precision]
    peak = peak_flops(device, dtype)
    method.to(device, dtype).eval()
    batch = next(evaluation_batches(clips, work.recipe.data, [list(range(len(clips)))])).to(device)
    languages = _language_ids(tokenizer, batch, device)
    synchronise = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    ledger, counter = Ledger(synchronise), FlopCounterMode(display=False)
    ledger.watch_module(method.visual, "forward visual")
    ledger.watch_module(method.language_model.get_encoder(), "forward encoder")
    ledger.watch_module(method.language_model.get_decoder(), "forward decoder")
    settings = work.recipe.evaluation

    @torch.inference_mode()
    def translate() -> list[list[int]]:
        return method.generate(
            batch.frames,
            languages,
            beams=settings.beams,
            length_penalty=settings.length_penalty,
            max_new_tokens=settings.max_new_tokens,
        )

    translate()
    with counter:
        translate()
    seconds, cpu_seconds, written = [], [], []
    for _ in range(work.steps):
        synchronise()
        begun, cpu_begun = time.perf_counter(), time.process_time()
        ledger.start()
        written = translate()
        ledger.stop()
        seconds.append(time.perf_counter() - begun)
        cpu_seconds.append(time.process_time() - cpu_begun)
    return Figures(
        device=_name(device),
        parameters=sum(parameter.numel() for parameter in method.parameters()),
        clips=len(clips),
        frames=int(sum(clips.frames)),
        padding=0.0,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        ledger=ledger.seconds,
        ledger_seconds=sum(seconds),
        flops=counter.get_total_flops(),
        peak_flops=peak,
        memory_gib=peak_memory_gib(device),
        result=[len(row) for row in written],
    )


def _language_ids(tokenizer: TextTokenizer, batch: VideoBatch, device: torch.device) -> Tensor:
    return torch.tensor([tokenizer.language_id(language) for language in batch.languages], device=device)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product or convolution in that precision, whichever is faster (the fp32
    product of a CPU may come from another library than its convolutions, and be half as fast)."""
    n, pictures = (8192, 256) if device.type == "cuda" else (2048, 32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x, weight = (
        torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for shape in ((pictures, 256, 14, 14), (256, 256, 3, 3))
    )
    works: tuple[tuple[int, Callable[[], Tensor]], ...] = (
        (2 * n**3, lambda: a @ b),
        (2 * x.numel() * 256 * 9, lambda: F.conv2d(x, weight, padding=1)),
    )
    best = 0.0
    with torch.no_grad():
        for operations, work in works:
            for _ in range(6):
                begun = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best = max(best, operations / (time.perf_counter() - begun))
    return best


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # not ru_maxrss, which a process takes over from the one that started it
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 2**20


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"
