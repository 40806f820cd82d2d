"""A training step, or decoding, measured: python tools/bench_train.py --recipe gfslt_vlp_v1 --lengths 32,64 [...].

Clips of the given lengths are cut out of drawn signing and packed, and a fresh process takes --steps steps with them,
all in one global batch: the stream, the engine and the loop of training, random weights of the recipe's sizes, without
augmentation. Printed are rates (medians over the steps), the processor's time, the peak of memory, and where the wall
time goes:

  data wait         until the stream hands over the next batch
  host to device    the copy of frames and ids
  forward NAME      of that part of the model, without parts inside it that have a line of their own
  loss              contrastive and language modelling losses, and their totals over the ranks
  backward          of everything, with what ZeRO does meanwhile
  norm, clipping    the gradient's norm, clipping, and what the engine does around the update (casts, copies)
  optimizer         the update itself
  the rest          of the loop, e.g. the learning rate, statistics kept for steps that are not finite

MFU is the share of what the device can do: the operations of the batch's matrix products and convolutions, forward and
backward (counted, on the very shapes, in a step before), per second, against a large product or convolution in the same
precision, measured just before. The peak of memory is the high-water mark of the process's resident memory on a CPU,
what was allocated on the device on a GPU.

--decode measures beam search of the clips instead. --baseline does the same work the way GFSLT-VLP's code does
(bench_baseline.py), in another process, and prints the ratio. --without takes a gain away:

  channels_last     the frame encoder's memory layout
  huge_pages        tensors on a CPU in pages of 2 MiB (THP_MEM_ALLOC_ENABLE=1, of torch, on Linux)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from bench_figures import Figures, Work

from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards.writing import write_shards
from sltscale.data.synthetic.corpus import make_corpus
from sltscale.data.video.cutting import source_frames
from sltscale.errors import InputError
from sltscale.evaluation.report import table
from sltscale.methods.parameters import count
from sltscale.recipe_files import load_recipe

DRAWN = 40  # sentences; their videos are up to some 400 frames long


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gfslt_vlp_v1", help="name or TOML file; --key value at the end changes it")
    parser.add_argument("--lengths", default="32,64", help="frames of each clip")
    parser.add_argument("--size", type=int, default=224, help="height and width of the frames")
    parser.add_argument("--vocabulary", type=int, default=2454, help="token ids of the model (default: GFSLT-VLP's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--stage", type=int, choices=range(4), help="of ZeRO (default: 0, with bf16 2)")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), help="default: the recipe's")
    parser.add_argument("--decode", action="store_true", help="beam search instead of training")
    parser.add_argument("--baseline", action="store_true", help="also the way of the field's code, with the ratio")
    parser.add_argument(
        "--without", choices=("channels_last", "huge_pages"), action="append", default=[], help="take this gain away"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options, overrides = parser.parse_known_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            work = prepare(options, overrides, Path(folder))
            figures = {}
            for name in ("sltscale", "baseline") if options.baseline else ("sltscale",):
                figures[name] = in_a_process(work, baseline=name == "baseline")
                print(f"{name}: {figures[name].step:.3f} s", flush=True)
    except InputError as error:
        print(f"bench_train: {error}", file=sys.stderr)
        return 2
    report(work, figures)
    if options.json is not None:
        options.json.write_text(json.dumps({name: asdict(found) for name, found in figures.items()}, indent=2) + "\n")
    return 0


def in_a_process(work: Work, baseline: bool = False) -> Figures:
    """A fresh one, so that its memory is that of the work."""
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0" if baseline or "huge_pages" in work.without else "1"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, work, baseline).result()


def _measure(work: Work, baseline: bool) -> Figures:
    from bench_work import measure, measure_baseline  # the stream's workers import this file, and need none of that

    return (measure_baseline if baseline else measure)(work)


def prepare(options: argparse.Namespace, overrides: list[str], folder: Path) -> Work:
    """Shards of clips of these lengths, and the recipe for them. InputError for a length that cannot be had."""
    shards, given = folder / "shards", options.lengths.split(",")
    lengths = [int(length) for length in given if length.isdecimal()]
    if len(lengths) < len(given) or min(lengths) < 1:
        raise InputError(f"--lengths {options.lengths}: expected numbers of frames from 1 up, like 32,64")
    stage = options.stage if options.stage is not None else 2 if options.precision == "bf16" else 0
    if options.precision == "bf16" and stage == 0 and not options.decode:
        raise InputError("--precision bf16 --stage 0: ZeRO 0 keeps no fp32 weights; use stage 1, 2 or 3")
    if options.steps < 1 or options.threads < 1:
        raise InputError(f"--steps {options.steps} --threads {options.threads}: expected at least one of each")
    optimizer = ["--optim.name", options.optimizer] if options.optimizer else []
    recipe = load_recipe(
        options.recipe,
        [
            *("--data.shards", str(shards), "--data.global_batch", str(len(lengths)), "--data.augment", "off"),
            *("--data.frame_size", str(options.size), "--data.crop_size", str(options.size)),
            *("--data.max_frames", str(max(lengths)), "--data.workers", "1", "--start", "none"),
            *("--train.keep_best", "none", "--train.select", "last", "--evaluation.every_epochs", "none"),
            *("--train.epochs", "1000000", "--train.checkpoint_every", "1000000", "--train.log_every", "1000000"),
            *optimizer,
            *overrides,
        ],
    )
    cut_clips(lengths, folder / "drawn", shards, options.size)
    return Work(
        recipe,
        options.vocabulary,
        options.precision,
        stage,
        options.steps,
        options.threads,
        options.decode,
        tuple(options.without),
    )


def cut_clips(lengths: list[int], drawn: Path, shards: Path, size: int) -> None:
    """Clips of exactly so many frames from drawn videos, one behind the other in each, as the split train."""
    annotations = make_corpus(drawn, clips=max(DRAWN, 4 * len(lengths)), seed=0, workers=1, progress=False)
    sentences = [line.split("\t")[4] for line in annotations.read_text(encoding="utf-8").splitlines()[1:]]
    videos = {
        path: [frame.pts * frame.time_base for frame in source_frames(path, size=16)]
        for path in sorted((drawn / "videos").iterdir())
    }
    used = dict.fromkeys(videos, 0)
    clips = []
    for number, length in enumerate(lengths):
        video = next((path for path, times in videos.items() if used[path] + length < len(times)), None)
        if video is None:
            longest = max(map(len, videos.values())) - 1
            raise InputError(f"--lengths: no drawn video has {length} frames left; give clips of at most {longest}")
        start, end = (videos[video][place] for place in (used[video], used[video] + length))
        clips.append(Clip(f"clip-{number}", video, start, end, sentences[number], "de", "train"))
        used[video] += length
    write_shards(
        clips, [], shards, split="train", corpus="bench", cutting=Cutting(size), clips_per_shard=64, progress=False
    )


def report(work: Work, figures: dict[str, Figures]) -> None:
    ours = figures["sltscale"]
    published = count(work.recipe.method, work.vocabulary).as_published
    what = f"beam {work.recipe.evaluation.beams}" if work.decode else f"{work.recipe.optim.name}, ZeRO {work.stage}"
    print(f"{work.recipe.name}, {work.precision}, {what}; {ours.device}; {ours.parameters} parameters")
    if published is not None:
        print(published)
    print(f"{ours.clips} clips, {ours.frames} frames of {work.recipe.data.crop_size} px; medians of {work.steps}")
    rows = [["", "s (from to)", "CPU s", "clips/s", "frames/s", "MFU", "memory, GiB", "results"]]
    for name, found in figures.items():
        rates = [
            f"{found.step:.3f} ({min(found.seconds):.3f} {max(found.seconds):.3f})",
            f"{statistics.median(found.cpu_seconds):.2f}",
            f"{found.clips / found.step:.3f}",
            f"{found.frames / found.step:.1f}",
        ]
        results = " ".join(f"{value:.4g}" for value in found.result)
        rows.append(
            [name, *rates, f"{100 * found.mfu:.1f} %" if found.flops else "-", f"{found.memory_gib:.2f}", results]
        )
    print(table(rows))
    if "baseline" in figures:
        time, memory = (getattr(figures["baseline"], name) / getattr(ours, name) for name in ("step", "memory_gib"))
        print(f"baseline / sltscale: {time:.2f} in time, {memory:.2f} in memory")
    steps, whole = len(ours.seconds), sum(ours.ledger.values())
    waiting = 100 * ours.ledger.get("data wait", 0.0) / whole
    print(
        f"{ours.flops / 1e9:.0f} GFLOP a step, {ours.peak_flops / 1e9:.0f} GFLOP/s at most; "
        f"padding {100 * ours.padding:.1f} % if padded; data wait {waiting:.1f} %"
    )
    rows = [["where the time goes", "s", "%"]]
    for account, seconds in sorted(ours.ledger.items(), key=lambda item: -item[1]):
        rows.append([account, f"{seconds / steps:.3f}", f"{100 * seconds / whole:.1f}"])
    rows.append(["sum", f"{whole / steps:.3f}", f"{100 * whole / ours.ledger_seconds:.1f} of the wall clock"])
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
