from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from source_videos import bare_decode, real_video, write_video

from sltscale.data.index import open_index, splits
from sltscale.data.shards import make_shards
from sltscale.data.video import decode_clip
from sltscale.errors import InputError

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"
HEADER = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit\n"
SETTINGS = {"frame_size": 64, "clips_per_shard": 4, "progress": False}


def stamp(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """annotations.tsv and videos/: 18 good train clips, 3 good dev clips, 6 bad train clips."""
    folder = tmp_path_factory.mktemp("corpus")
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
    (folder / "annotations.tsv").write_text(HEADER + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return folder


def pack(corpus: Path, out: Path, **changes: object) -> None:
    make_shards("openasl", corpus / "annotations.tsv", corpus / "videos", out, **(SETTINGS | {"workers": 1} | changes))


@pytest.fixture(scope="module")
def packed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(corpus, out)
    return out


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_plain_webdataset_reads_every_clip(packed: Path) -> None:
    for split, count in (("train", 18), ("dev", 3)):
        index = open_index(packed, split)
        tars = sorted(str(path) for path in packed.glob(f"{split}-*.tar"))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False))
        assert len(samples) == len(index) == count
        for clip, sample in enumerate(samples):
            facts = json.loads(sample["json"])
            assert sample["__key__"] == index.key(clip)
            assert facts["id"] == index.id(clip)
            assert facts["text"] == index.text(clip) == sample["txt"].decode()
            assert facts["split"] == split and facts["language"] == "en"
            assert facts["fps"] == index.fps[clip].tolist() == [25, 1]
            assert sample["mp4"] == index.video_bytes(clip)
            assert facts["frames"] == index.frames[clip] == len(decode_clip(sample["mp4"]))


def test_keys_are_safe_and_unique(packed: Path) -> None:
    index = open_index(packed, "train")
    keys = [index.key(clip) for clip in range(len(index))]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", key) for key in keys)
    assert index.id(0) == "-one-00:00:00.000-00:00:00.800" and keys[0] == "_one-00_00_00_000-00_00_00_800"


def test_ids_that_clash_when_made_safe(tmp_path: Path, corpus: Path) -> None:
    ids = ["a.b", "a:b", "a/b", "ä" * 300, "ä" * 299]
    rows = [f"{id}\t-one\t{stamp(0)}\t{stamp(0.2)}\tText.\t\t\ttrain\n" for id in ids]
    (tmp_path / "a.tsv").write_text(HEADER + "".join(rows), encoding="utf-8")
    make_shards("openasl", tmp_path / "a.tsv", corpus / "videos", tmp_path / "out", workers=1, **SETTINGS)
    index = open_index(tmp_path / "out", "train")
    keys = [index.key(clip) for clip in range(len(index))]
    assert [index.id(clip) for clip in range(len(index))] == ids
    assert len(set(keys)) == len(ids) and max(map(len, keys)) <= 80
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert sum("mp4" in sample for sample in webdataset.WebDataset(tars, shardshuffle=False)) == len(ids)


def test_rejects_are_counted_and_listed(packed: Path, corpus: Path) -> None:
    report = json.loads((packed / "train.report.json").read_text(encoding="utf-8"))
    assert (report["packed"], report["rejected_count"], report["frames"]) == (18, 6, 18 * 20)
    reasons = {row["id"]: row["reason"] for row in report["rejected"]}
    assert set(reasons) == {"late", "beyond", "noise", "empty", "reversed", "missing"}
    assert "past the video's end at 3.000 s" in reasons["late"] and "past the video's end" in reasons["beyond"]
    assert "cannot be decoded" in reasons["noise"] and "cannot be decoded" in reasons["empty"]
    lines = (corpus / "annotations.tsv").read_text(encoding="utf-8").split("\n")
    assert all(lines[row["line"] - 1].startswith(row["id"] + "\t") for row in report["rejected"])
    assert report["seconds"] == pytest.approx(18 * 0.8) and report["shards"] == 6
    assert report["bytes"] == sum(path.stat().st_size for path in packed.glob("train-*.tar"))
    assert json.loads((packed / "dev.report.json").read_text(encoding="utf-8"))["rejected"] == []


def test_same_bytes_again_and_with_two_workers(tmp_path: Path, corpus: Path, packed: Path) -> None:
    pack(corpus, tmp_path / "two", workers=2)
    assert contents(tmp_path / "two") == contents(packed)
    before = {path: path.stat().st_mtime_ns for path in packed.glob("*.tar")}
    expected = contents(packed)
    pack(corpus, packed)
    assert contents(packed) == expected
    assert {path: path.stat().st_mtime_ns for path in packed.glob("*.tar")} == before  # nothing was packed again


def test_one_split_alone_gives_the_same_bytes(tmp_path: Path, corpus: Path, packed: Path) -> None:
    pack(corpus, tmp_path / "out", splits=["dev"])
    assert splits(tmp_path / "out") == ["dev"] and splits(packed) == ["train", "dev"]
    expected = {name: digest for name, digest in contents(packed).items() if "dev" in name}
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_started_again(tmp_path: Path, corpus: Path, packed: Path, workers: int) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(TOOL), "--corpus", "openasl", "--annotations", str(corpus / "annotations.tsv")]
    command += ["--videos", str(corpus / "videos"), "--out", str(out), "--frame-size", "64"]
    command += ["--clips-per-shard", "4", "--workers", str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("parts/train-*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers must end with their parent"
    assert not (out / "train.index.safetensors").exists()
    (out / "train-000003.tar.1.tmp").write_bytes(b"half a shard")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "train: 18 clips" in done.stdout and "6 rejected" in done.stdout
    assert contents(out) == contents(packed)


def test_a_lost_or_cut_tar_is_packed_again(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    pack(corpus, out)
    (out / "train-000001.tar").unlink()
    with (out / "train-000002.tar").open("r+b") as file:
        file.truncate(1000)
    pack(corpus, out)
    assert contents(out) == contents(packed)


def test_other_settings_or_annotations_are_refused(tmp_path: Path, corpus: Path, packed: Path) -> None:
    before = contents(packed)
    with pytest.raises(InputError, match="frame_size 64, now 32"):
        pack(corpus, packed, frame_size=32)
    changed = (corpus / "annotations.tsv").read_text(encoding="utf-8").replace("Sätz 4", "Satz 4")
    (tmp_path / "a.tsv").write_text(changed, encoding="utf-8")
    with pytest.raises(InputError, match="other annotations"):
        make_shards("openasl", tmp_path / "a.tsv", corpus / "videos", packed, workers=1, **SETTINGS)
    assert contents(packed) == before


def test_nothing_usable_is_an_input_error_with_a_report(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "a.tsv").write_text(HEADER + "x\tnoise\t\t\tNoise.\t\t\ttrain\n")
    with pytest.raises(InputError, match="nothing could be packed"):
        make_shards("openasl", tmp_path / "a.tsv", corpus / "videos", tmp_path / "out", workers=1, **SETTINGS)
    assert json.loads((tmp_path / "out" / "train.report.json").read_text())["rejected"][0]["id"] == "x"
    assert splits(tmp_path / "out") == [] and not list((tmp_path / "out").glob("*.tar*"))


def test_full_disk_keeps_what_is_finished(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    sizes = [(packed / f"train-{number:06d}.tar").stat().st_size for number in range(6)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = max(sizes) - 1  # the kernel refuses to let any file grow beyond this
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(InputError, match="cannot be written"):
            pack(corpus, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.rglob("*.tmp")) and not splits(out)
    pack(corpus, out)
    assert contents(out) == contents(packed)


def test_unwritable_place_and_bad_settings(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        pack(corpus, tmp_path / "file" / "out")
    with pytest.raises(InputError, match="even number"):
        pack(corpus, tmp_path / "out", frame_size=63)
    with pytest.raises(InputError, match="no clip of split 'test'; found train, dev"):
        pack(corpus, tmp_path / "out", splits=["test"])


def test_tool_prints_one_line_and_exits_with_2(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, str(TOOL), "--corpus", "openasl", "--annotations", str(tmp_path / "none.tsv")]
    command += ["--videos", str(corpus / "videos"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "No such file" in done.stderr


def test_two_packers_do_not_share_a_split(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "out" / "parts").mkdir(parents=True)
    with (tmp_path / "out" / "parts" / "train.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            pack(corpus, tmp_path / "out")


def test_real_footage_keeps_every_frame(tmp_path: Path) -> None:
    spans = {
        "slp_pose_test_video.mp4": [(0.0, 0.7), (0.7, 1.938)],
        "ssvp_slt_demo.gif": [(0.0, 2.5), (2.5, 5.01), (5.01, 7.54)],
        "openasl_teaser.gif": [(0.0, 1.1), (1.1, 2.96)],
    }
    videos = real_video(next(iter(spans))).parent
    rows, expected = [], []
    for name, cuts in spans.items():
        times = [float(time) for time, _ in bare_decode(real_video(name))]
        for start, end in cuts:
            id = f"{name}-{start}"
            rows.append(f"{id}\t{Path(name).stem}\t{stamp(start)}\t{stamp(end)}\tText.\t\t\ttrain\n")
            expected.append((id, sum(start <= time < end for time in times)))
    (tmp_path / "a.tsv").write_text(HEADER + "".join(rows))
    make_shards("openasl", tmp_path / "a.tsv", videos, tmp_path / "out", workers=1, **SETTINGS)
    index = open_index(tmp_path / "out", "train")
    assert [(index.id(clip), int(index.frames[clip])) for clip in range(len(index))] == expected
    assert sum(count for _, count in expected) == 58 + 181 + 74
    assert [len(decode_clip(index.video_bytes(clip))) for clip in range(len(index))] == index.frames.tolist()
