"""What a run says while it works: one line per log step, steps.jsonl, TensorBoard, learning curves as a picture."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from sltscale.engine.global_loss import Totals
from sltscale.engine.run_folder import RunFolder
from sltscale.files import write_atomically

NEVER = 10**8  # seconds


class Telemetry:
    """Rank 0's voice; on other ranks every method does nothing (``folder`` None).

    FencedError instead of a line if the run folder is another attempt's by now.
    """

    def __init__(self, name: str, folder: RunFolder | None, first_step: int, total_steps: int) -> None:
        self.name = name
        self.total_steps = total_steps
        self.window = _Window()
        self.folder = folder
        self._log: IO[str] | None = None
        self._steps: IO[str] | None = None
        self._board: SummaryWriter | None = None
        if folder is not None:
            folder.keep_steps_until(first_step)
            self._log = folder.log.open("a", encoding="utf-8")
            self._steps = folder.steps.open("a", encoding="utf-8", buffering=1)
            # Flushed by hand: the writer's own thread would also write for a rank whose run has been taken over.
            self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step, flush_secs=NEVER)

    def say(self, line: str) -> None:
        if self._log is not None and self.folder is not None:
            self.folder.check_owner()
            print(line, flush=True)
            print(line, file=self._log, flush=True)

    def step(self, step: int, totals: Totals, lr: float, *, clips: int, waited: float) -> None:
        """Note one optimizer step of ``clips`` clips; waited: the seconds spent on data."""
        numbers = totals.losses | totals.metrics
        self.window.add(numbers, clips, totals, waited)
        if self._steps is not None:
            record = {"step": step, **numbers, "lr": lr, "clips": clips, "frames": totals.frames}
            self._steps.write(json.dumps(record) + "\n")

    def skipped(self, step: int, why: str) -> None:
        """Note a step whose loss or gradient was not finite."""
        self.say(f"warning: {self.name} {why}")
        if self._steps is not None:
            self._steps.write(json.dumps({"step": step, "not_finite": why}) + "\n")

    def report(self, step: int, epoch: int, lr: float) -> None:
        """Print and plot the means since the last report; ``step`` steps are done."""
        if self._board is None or not self.window.steps:
            return
        means, rates = self.window.close()
        parts = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "loss" and "/" not in name)
        left = (self.total_steps - step) * rates["seconds_per_step"]
        self.say(
            f"{self.name} step {step}/{self.total_steps} epoch {epoch + 1} | loss {means['loss']:.4f} ({parts}) | "
            f"{rates['clips_per_s']:.1f} clips/s {rates['frames_per_s']:.0f} frames/s | "
            f"data wait {100 * rates['data_wait']:.0f} % | memory {rates['memory_mib']:.0f} MiB | lr {lr:.2e} | "
            f"{_clock(left)} left" + (f" | {retries:.0f} reads tried again" if (retries := rates["retries"]) else "")
        )
        for name, value in {**means, **rates, "lr": lr}.items():
            self._board.add_scalar(f"train/{name}", value, step)
        self._board.flush()

    def exclude(self, seconds: float) -> None:
        """Leave time that went into saving and scoring out of the rates."""
        self.window.started += seconds

    def scalars(self, step: int, prefix: str, values: dict[str, Any]) -> None:
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{prefix}/{name}", value, step)
            self._board.flush()

    def samples(self, step: int, pairs: list[tuple[str, str, str]]) -> None:
        """Text samples (id, reference, hypothesis) for TensorBoard, fenced so that no markup is interpreted."""
        if self._board is not None and pairs:
            lines = [f"    {key}\n    reference:  {reference}\n    hypothesis: {hyp}" for key, reference, hyp in pairs]
            self._board.add_text("dev/samples", "\n\n".join(lines), step)
            self._board.flush()

    def close(self) -> None:
        for stream in (self._log, self._steps, self._board):
            if stream is not None:
                stream.close()
        if self.folder is not None and self.folder.steps.stat().st_size:
            draw_curves(self.folder.steps, self.folder.path / "curves.png", self.name)


class _Window:
    """Sums since the last report."""

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self.started = time.perf_counter()
        self.steps = self.clips = self.frames = self.retries = 0
        self.waited = 0.0
        self.losses: dict[str, float] = {}

    def add(self, losses: dict[str, float], clips: int, totals: Totals, waited: float) -> None:
        self.steps += 1
        self.clips += clips
        self.frames += totals.frames
        self.retries += totals.retries
        self.waited += waited
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def close(self) -> tuple[dict[str, float], dict[str, float]]:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        steps = max(self.steps, 1)
        means = {name: value / steps for name, value in self.losses.items()}
        rates = {
            "clips_per_s": self.clips / seconds,
            "frames_per_s": self.frames / seconds,
            "data_wait": self.waited / seconds,
            "retries": self.retries,
            "seconds_per_step": seconds / steps,
            "memory_mib": _memory_mib(),
        }
        self._open()
        return means, rates


def _memory_mib() -> float:
    """Peak of the device's memory on a GPU, the resident size of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def draw_curves(steps: Path, picture: Path, title: str) -> None:
    """Loss parts and learning rate over the steps of steps.jsonl, as a png."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    records = [record for record in lines if "not_finite" not in record]
    if not records:
        return
    names = [name for name in records[-1] if name not in ("step", "lr", "clips", "frames") and "/" not in name]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = [record["step"] for record in records]
    for name in names:
        axes.plot(numbers, [record[name] for record in records], label=name, linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    rate = axes.twinx()
    rate.plot(numbers, [record["lr"] for record in records], color="grey", linestyle=":", linewidth=1)
    rate.set_ylabel("learning rate (dotted)")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    write_atomically(picture, content.getvalue())
