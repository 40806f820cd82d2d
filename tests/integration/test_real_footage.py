"""Real signing goes the whole road, at C2RL's published sizes: spans, shards, stream, training step, translation.

The videos are not part of the project (research licences); the tests look for them beside the repository.
"""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from launching import ROOT, Launcher
from tiny_recipes import write_recipes

from sltscale.config import DataSettings
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import stream
from sltscale.data.shards.index import open_index
from sltscale.data.video.cutting import source_frames
from sltscale.models.frames import yuv_to_rgb

VIDEOS = ROOT.parent / "shared/videos"
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not VIDEOS.is_dir(), reason="real videos are not beside the repository (shared/videos)"),
]
Command = Callable[..., subprocess.CompletedProcess[str]]

# One keyframe and B-frames at 359/12 fps, full range; variable-rate gif; gif of 960x360.
SPANS = (
    ("slp_pose_test_video", "00:00:00.000", "00:00:00.800", "hello there", "train"),
    ("ssvp_slt_demo", "00:00:00.500", "00:00:01.700", "this is how signing goes", "train"),
    ("openasl_teaser", "00:00:01.000", "00:00:02.000", "several people sign", "train"),
    ("slp_pose_test_video", "00:00:00.800", "00:00:01.500", "there it is", "train"),
    ("ssvp_slt_demo", "00:00:03.000", "00:00:04.100", "this is it", "valid"),
    ("openasl_teaser", "00:00:02.000", "00:00:02.700", "people sign", "test"),
    ("openasl_teaser", "00:00:05.000", "00:00:04.000", "ends before it starts", "train"),
    ("ssvp_slt_demo", "00:10:00.000", "00:10:02.000", "past the end", "train"),
)


@dataclass(frozen=True)
class Packed:
    shards: Path
    spans: dict[str, tuple[str, str, str]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Packed:
    folder = tmp_path_factory.mktemp("real")
    rows = ["vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit"]
    spans = {}
    for yid, start, end, text, split in SPANS:
        vid = f"{yid}-{start}-{end}"
        spans[vid] = (yid, start, end)
        rows.append("\t".join((vid, yid, start, end, text, text, "", split)))
    (folder / "spans.tsv").write_text("\n".join(rows) + "\n")
    done = command(
        *("tools/make_shards.py", "--corpus", "openasl", "--annotations", folder / "spans.tsv"),
        *("--videos", VIDEOS, "--out", folder / "shards", "--workers", "1"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "shards/train.report.json").read_text())
    assert len(report["rejected"]) == 2
    return Packed(folder / "shards", spans)


def seconds(timestamp: str) -> Fraction:
    hours, minutes, rest = timestamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + Fraction(rest)


def test_every_frame_of_the_bare_decoder_passes_the_stream(packed: Packed) -> None:
    index = open_index(packed.shards, "train")
    settings = DataSettings(
        shards=str(packed.shards), frame_size=256, crop_size=256, global_batch=2, workers=0, augment="off"
    )
    plan = Plan(index.frames, 0, BatchRule(clips=2))
    batches = stream(
        Selection([index]), plan, settings, seed=0, rank=0, world_size=1, first_step=0, last_step=plan.steps(1)
    )
    seen = {clip: frames for _, batch in batches for clip, frames in zip(batch.ids, batch.frames.split(), strict=True)}
    assert len(seen) == len(index) == 4
    for clip, frames in seen.items():
        yid, start, end = packed.spans[clip]
        path = next(VIDEOS.glob(f"{yid}.*"))
        whole = list(source_frames(path, start=None, end=None, size=256))
        inside = [frame for frame in whole if seconds(start) <= frame.pts * frame.time_base < seconds(end)]
        assert len(frames) == len(inside) > 10
        for ours, source in zip(frames, inside, strict=True):
            difference = abs(yuv_to_rgb(ours[None])[0].permute(1, 2, 0).numpy() - source.rgb.astype(float))
            assert difference.mean() < 12, clip  # crf 23, 4:2:0


@pytest.mark.slow
def test_published_sizes_take_steps_on_it(packed: Packed, launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "c2rl_pretrain"
    arguments = ["--deepspeed", str(ROOT / "ds_configs/zero2.json"), "--recipe", "c2rl_pretrain", "--run", str(run)]
    small = ["--data.shards", str(packed.shards), "--data.global_batch", "4", "--data.workers", "1"]
    output = launcher.check(
        ROOT / "sltscale/train.py", [*arguments, *small, "--train.epochs", "2", "--train.log_every", "1"], ranks=2
    )
    assert "c2rl_pretrain: c2rl, 4" in output
    records = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert records[1]["loss"] < records[0]["loss"]


@pytest.mark.slow
def test_translate_real_files(packed: Packed, launcher: Launcher, command: Command, tmp_path: Path) -> None:
    recipes = write_recipes(tmp_path, packed.shards)
    run = tmp_path / "run"
    launcher.check(
        ROOT / "sltscale/train.py",
        ["--deepspeed", str(ROOT / "ds_configs/zero2.json"), "--recipe", str(recipes.translate), "--run", str(run)]
        + ["--start", "none", "--data.frame_size", "256", "--data.crop_size", "224", "--data.global_batch", "4"],
        ranks=1,
    )
    files = sorted(path for path in VIDEOS.iterdir() if path.suffix in (".mp4", ".gif"))
    done = command("-m", "sltscale.cli", "translate", "--run", run, *files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(path) for path in files]
