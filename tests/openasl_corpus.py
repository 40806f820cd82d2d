"""A small corpus in OpenASL's format for the tests of packing, and what packing leaves in a folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
from source_videos import write_video

from sltscale.data.clips import Cutting
from sltscale.data.shards.merge import Report
from sltscale.data.shards.writing import make_shards

HEADER = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit\n"
SIZE = 64
CLIPS_PER_SHARD = 4
REPOSITORY = Path(__file__).parents[1]


def stamp(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}"


def write_corpus(folder: Path) -> Path:
    """annotations.tsv and videos/: 18 good train clips, 3 good dev clips, 6 bad train clips."""
    videos = folder / "videos"
    videos.mkdir()
    for name in ("-one", "two.x"):
        write_video(videos / f"{name}.mp4", 75)
    (videos / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    (videos / "empty.mp4").touch()
    rows = []
    for number in range(18):
        name, start = ("-one", "two.x")[number % 2], number * 0.1
        id = f"{name}-{stamp(start)}-{stamp(start + 0.8)}"
        rows.append(f"{id}\t{name}\t{stamp(start)}\t{stamp(start + 0.8)}\tSätz {number}.\t\t\ttrain")
        if number < 3:
            rows.append(f"dev/{number}\t{name}\t\t\tDev {number}.\t\t\tvalid")
    rows.insert(2, f"late\t-one\t{stamp(1)}\t{stamp(9)}\tToo late.\t\t\ttrain")
    rows.insert(5, f"beyond\t-one\t{stamp(10)}\t{stamp(11)}\tBeyond.\t\t\ttrain")
    rows.insert(7, "noise\tnoise\t\t\tNoise.\t\t\ttrain")
    rows.insert(9, "empty\tempty\t\t\tEmpty.\t\t\ttrain")
    rows.insert(11, f"reversed\t-one\t{stamp(2)}\t{stamp(1)}\tReversed.\t\t\ttrain")
    rows.insert(13, "missing\tnowhere\t\t\tMissing.\t\t\ttrain")
    write_annotations(folder / "annotations.tsv", rows)
    return folder


def write_annotations(path: Path, rows: list[str]) -> Path:
    path.write_text(HEADER + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def pack(corpus: Path, out: Path, *, cutting: Cutting | None = None, **changes: object) -> list[Report]:
    settings: dict[str, object] = {"clips_per_shard": CLIPS_PER_SHARD, "workers": 1, "progress": False}
    annotations = [corpus / "annotations.tsv"]
    return make_shards(
        "openasl", annotations, corpus / "videos", out, cutting=cutting or Cutting(SIZE), **(settings | changes)
    )


def tool(corpus: Path, out: Path, *options: object) -> list[str]:
    """The command that packs as ``pack`` does."""
    command = [sys.executable, str(REPOSITORY / "tools" / "make_shards.py"), "--corpus", "openasl"]
    command += ["--annotations", str(corpus / "annotations.tsv"), "--videos", str(corpus / "videos")]
    command += ["--out", str(out), "--frame-size", str(SIZE), "--clips-per-shard", str(CLIPS_PER_SHARD)]
    return [*command, *map(str, options)]


def contents(folder: Path) -> dict[str, str]:
    """sha256 of the files that anyone uses: tars, indexes, reports."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


def kill_after(command: list[str], seconds: float) -> bool:
    """Start the command and kill it (-9) after ``seconds``; False if it ended, well, before. Workers end with it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return True
        assert process.returncode == 0, process.stderr and process.stderr.read().decode()
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and see its children end."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "workers must end with their parent"


def undo_a_shard(out: Path, number: int) -> None:
    """Make shard ``number`` of train unpacked, as if the run had been killed before it."""
    for path in (out / f"train-{number:06d}.tar", out / "parts" / f"train-{number:06d}.json"):
        path.unlink(missing_ok=True)
