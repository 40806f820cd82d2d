"""Indexes and plans at scale: python tools/bench_plan.py [--clips 1000000] [--lengths FILE] [--ranks 8].

Two tables: opening an index of made-up clips and planning an epoch of it, in a process of its own (seconds, peak
memory); and what batch rules waste on given lengths (a text file, one number of frames a line; default: made up, with
the mean and spread of PHOENIX-2014T).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.shards.index import Row, Shard, write_index

FRAMES = BatchRule(frames=9600, window=4096, multiple=8)
CLIPS = BatchRule(clips=256)
RULES = {
    "84 clips": BatchRule(clips=84),
    "84 clips, window 4096": BatchRule(clips=84, window=4096),
    "9600 frames, window 512": BatchRule(frames=9600, window=512, multiple=8),
    "9600 frames, window 4096": FRAMES,
    "9600 frames and 96 clips": BatchRule(clips=96, frames=9600, window=4096, multiple=8),
}
CHILD = """
import json, sys, time
from pathlib import Path
import numpy
from sltscale.data.batches.batching import BatchRule
from sltscale.data.shards.index import open_index
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection

def memory():
    # Not getrusage: its peak counts what the parent held when it forked.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

facts = {"imports_mib": memory()}
began = time.perf_counter()
index = open_index(Path(sys.argv[1]), "train")
facts["open_s"] = time.perf_counter() - began
began = time.perf_counter()
plan = Plan(Selection([index]).frames, 0, BatchRule(**json.loads(sys.argv[2])))
steps = plan.steps(1)
plan.share(0, 0, 8)
facts["plan_s"] = time.perf_counter() - began
facts["steps"] = steps
index.text(len(index) // 2), index.id(len(index) - 1)
facts["peak_mib"] = memory()
print(json.dumps(facts))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_index(Path(folder), "train", _shards(arguments.clips), corpus="made up", frame_size=256)
        size = (Path(folder) / "train.index.safetensors").stat().st_size
        print(f"index of {arguments.clips} clips: {size / 1e6:.0f} MB, written in {time.perf_counter() - began:.1f} s")
        for rule in (CLIPS, FRAMES):
            command = [sys.executable, "-c", CHILD, folder, json.dumps(vars(rule))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
            facts = json.loads(done.stdout)
            print(
                f"  {rule}: opened in {1000 * facts['open_s']:.1f} ms, an epoch of {facts['steps']} steps planned in "
                f"{facts['plan_s']:.2f} s, peak {facts['peak_mib']:.0f} MiB ({facts['imports_mib']:.0f} of imports)"
            )
    lengths = _lengths(arguments.lengths)
    print(f"{len(lengths)} clips of {lengths.min()} to {lengths.max()} frames, mean {lengths.mean():.0f}")
    print(f"{'rule':26s} {'steps':>6s} {'padding':>8s} {'busiest rank':>13s} {'most of a rank, padded':>22s}")
    for name, rule in RULES.items():
        plan = Plan(lengths, 0, rule)
        waste = plan.padding_and_imbalance(0, arguments.ranks)
        shares = [lengths[share] for step in range(plan.steps(1)) for share in plan.shares(step, arguments.ranks)]
        peak = max(len(share) * int(share.max()) for share in shares)
        print(f"{name:26s} {plan.steps(1):6d} {100 * waste.padding:7.1f}% {100 * waste.imbalance:+12.1f}% {peak:22d}")


def _shards(clips: int) -> Iterator[Shard]:
    rng = np.random.default_rng(0)
    for number in range(0, clips, 500):
        count = min(500, clips - number)
        frames = rng.integers(10, 300, count).tolist()
        rows = [
            Row(
                id=f"video{(number + k) // 50:08d}-{k % 50:04d}.00:00:{k % 60:02d}",
                key=f"video{(number + k) // 50:08d}-{k % 50:04d}_00_00_{k % 60:02d}",
                text=f"A made-up sentence of about the usual length, number {number + k}.",
                language="en",
                frames=frames[k],
                fps=(25, 1),
                offset=k * 150_000,
                size=149_000,
                sha256="0f" * 32,
                record=(k * 150_000, k * 150_000 + 150_000),
                crc32=(1, 2, 3),
                source=f"video{(number + k) // 50:08d}.mp4",
                resolution=(1280, 720),
            )
            for k in range(count)
        ]
        yield Shard(f"train-{number // 500:06d}.tar", 150_000 * count, "0f" * 32, rows)


def _lengths(path: Path | None) -> np.ndarray:
    if path is not None:
        return np.loadtxt(path, dtype=np.int64, ndmin=1)
    return np.clip(np.random.default_rng(0).lognormal(np.log(106), 0.42, 7096), 16, 475).astype(np.int64)


if __name__ == "__main__":
    main()
