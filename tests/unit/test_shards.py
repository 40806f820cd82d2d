from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from openasl_corpus import (
    SIZE,
    contents,
    end,
    kill_after,
    pack,
    stamp,
    tool,
    undo_a_shard,
    write_annotations,
    write_corpus,
)
from source_videos import bare_decode, real_video

from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards import writing
from sltscale.data.shards.index import open_index, splits
from sltscale.data.shards.merge import merge
from sltscale.data.shards.writing import make_shards, write_shards
from sltscale.data.video.stored import decode_clip
from sltscale.errors import InputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def packed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(corpus, out)
    return out


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
    rows = [f"{id}\t-one\t{stamp(0)}\t{stamp(0.2)}\tText.\t\t\ttrain" for id in ids]
    annotations = write_annotations(tmp_path / "a.tsv", rows)
    make_shards("openasl", [annotations], corpus / "videos", tmp_path / "out", cutting=Cutting(SIZE), workers=1)
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
    assert "cannot be decoded" in reasons["noise"] and "empty" in reasons["empty"]
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
    pack(corpus, tmp_path / "out", split="dev")
    assert splits(tmp_path / "out") == ["dev"] and splits(packed) == ["train", "dev"]
    expected = {name: digest for name, digest in contents(packed).items() if "dev" in name}
    found = contents(tmp_path / "out")
    assert {name: digest for name, digest in found.items() if name not in ("report.json", "report.html")} == expected


def test_killed_and_started_again(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    command = tool(corpus, out, "--workers", 2)
    kills = 0
    while kills < 2:
        before = len(list(out.glob("parts/train-*.json")))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("parts/train-*.json"))) <= before:
                time.sleep(0.002)
            if process.poll() is None:
                end(process)
                kills += 1
        if (out / "train.index.safetensors").exists():  # on a busy machine it may get to its end before it is killed
            (out / "train.index.safetensors").unlink()
            undo_a_shard(out, 0)
    (out / "train-000003.tar.tmp").write_bytes(b"half a shard")
    (out / "parts" / "train-000004.json.77.tmp").write_bytes(b"{")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "train: 18 clips" in done.stdout and "6 rejected" in done.stdout
    assert contents(out) == contents(packed)
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_killed_ten_times_at_random_moments(tmp_path: Path, corpus: Path, packed: Path, workers: int) -> None:
    out = tmp_path / "out"
    command = tool(corpus, out, "--workers", workers)
    begun = time.monotonic()
    assert not kill_after(command, 300)
    longest = time.monotonic() - begun
    shutil.rmtree(out)
    moments = np.random.default_rng(workers)
    kills = 0
    while kills < 10:
        if kill_after(command, moments.uniform(0, longest)):
            kills += 1
        else:
            undo_a_shard(out, int(moments.integers(6)))
    assert not kill_after(command, 300)
    assert contents(out) == contents(packed)
    assert not list(out.rglob("*.tmp"))


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
    for cutting, difference in (
        (Cutting(32), "frame_size 64, now 32"),
        (Cutting(SIZE, fps=Fraction(25, 2)), "fps None, now '25/2'"),
        (Cutting(SIZE, aspect="keep"), "aspect 'squash', now 'keep'"),
        (Cutting(SIZE, margin=0.5), "margin 0.0, now 0.5"),
        (Cutting(SIZE, crop=(0, 0, 0.5, 1)), r"crop None, now \[0, 0, 0.5, 1\]"),
        (Cutting(SIZE, preset="jpeg"), "preset 'h264', now 'jpeg'|encoder"),
    ):
        with pytest.raises(InputError, match=difference):
            pack(corpus, packed, cutting=cutting)
    changed = (corpus / "annotations.tsv").read_text(encoding="utf-8").replace("Sätz 4", "Satz 4")
    (tmp_path / "a.tsv").write_text(changed, encoding="utf-8")
    with pytest.raises(InputError, match="other annotations"):
        make_shards(
            "openasl", [tmp_path / "a.tsv"], corpus / "videos", packed, cutting=Cutting(SIZE), clips_per_shard=4
        )
    assert contents(packed) == before


def test_each_fact_of_a_clip_counts(tmp_path: Path, corpus: Path) -> None:
    """What the bytes depend on: any other clip than the one that packing began with is refused."""
    clip = Clip("id", corpus / "videos" / "-one.mp4", Fraction(0), Fraction(1), "Text.", "en", "dev", 3)
    changes: list[dict[str, object]] = [
        {"path": corpus / "videos" / "two.x.mp4"},
        {"start": Fraction(1, 3)},
        {"end": None},
        {"text": "Text!"},
        {"language": "de"},
        {"signer": "s"},
        {"crop": (0, 0, 32, 32)},
        {"fps": Fraction(25)},
        {"images": ("1.png",)},
    ]
    settings: dict[str, Any] = {"split": "dev", "corpus": "c", "cutting": Cutting(SIZE), "progress": False}
    write_shards([clip], [], tmp_path, **settings)
    write_shards([replace(clip, path=tmp_path / "moved" / clip.path.name, line=9)], [], tmp_path, **settings)
    for change in changes:
        with pytest.raises(InputError, match="from other annotations or videos"):
            write_shards([replace(clip, **change)], [], tmp_path, **settings)


def test_nothing_usable_is_an_input_error_with_a_report(tmp_path: Path, corpus: Path) -> None:
    annotations = write_annotations(tmp_path / "a.tsv", ["x\tnoise\t\t\tNoise.\t\t\ttrain"])
    with pytest.raises(InputError, match="nothing could be packed"):
        make_shards("openasl", [annotations], corpus / "videos", tmp_path / "out", cutting=Cutting(SIZE), workers=1)
    assert json.loads((tmp_path / "out" / "train.report.json").read_text())["rejected"][0]["id"] == "x"
    assert splits(tmp_path / "out") == [] and not list((tmp_path / "out").glob("*.tar*"))


def test_full_disk_keeps_what_is_finished(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    sizes = [(packed / f"train-{number:06d}.tar").stat().st_size for number in range(6)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = max(sizes) - 1  # the kernel refuses to let any file grow beyond this
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(InputError, match=r"cannot be written .*B more needed for [0-9]+ clips, .*GB free"):
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
        pack(corpus, tmp_path / "out", cutting=Cutting(63))
    with pytest.raises(InputError, match="0 clips a shard"):
        pack(corpus, tmp_path / "out", clips_per_shard=0)
    with pytest.raises(InputError, match="no clip of split 'test'; found train, dev"):
        pack(corpus, tmp_path / "out", split="test")


def test_full_file_system(tmp_path: Path, corpus: Path, packed: Path) -> None:
    """A file system of its own that is nearly large enough: begun with a warning, stopped in the middle."""
    place = tmp_path / "small"
    place.mkdir()
    size = sum(path.stat().st_size for path in packed.glob("*.tar"))
    script = (
        'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && "$@"; echo "code $?"; ls "$OUT"; cp -r "$OUT" "$COPY"'
    )
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
        str(size * 6 // 10),
        str(place),
    ]
    environment = os.environ | {"OUT": str(place / "out"), "COPY": str(tmp_path / "copy")}
    done = subprocess.run(
        [*command, *tool(corpus, place / "out", "--workers", 1)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert "code 2" in done.stdout, done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert re.search(r"about [0-9.]+ [kM]B more needed for [0-9]+ clips, [0-9.]+ kB free", done.stderr)
    tars = [line for line in done.stdout.split() if line.endswith(".tar")]
    assert tars and not [line for line in done.stdout.split() if line.endswith(".tmp")]
    expected = contents(packed)
    assert {name: contents(tmp_path / "copy")[name] for name in tars} == {name: expected[name] for name in tars}
    pack(corpus, tmp_path / "copy")
    assert contents(tmp_path / "copy") == expected


def test_tool_prints_one_line_and_exits_with_2(tmp_path: Path, corpus: Path) -> None:
    command = tool(tmp_path / "none", tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "No such file" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--fps", "1/0", "expected a rate"),
        ("--fps", "1e400", "expected a rate"),
        ("--crop", "0,0,1", "expected four shares"),
        ("--part", "3", "expected I/N"),
        ("--workers", "0", "0 workers: expected at least 1"),
    ],
)
def test_options_of_the_tool_are_read_strictly(
    tmp_path: Path, corpus: Path, option: str, value: str, expected: str
) -> None:
    done = subprocess.run(tool(corpus, tmp_path / "out", option, value), capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and expected in done.stderr.splitlines()[-1], done.stderr


def test_progress_goes_into_the_log_of_a_batch_job(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writing, "LOGGED_SECONDS", 0.0)
    pack(corpus, tmp_path / "out", progress=True)
    assert "train:" in capsys.readouterr().err


def test_webdataset_is_imported_without_pickles_and_pipes() -> None:
    code = "import sltscale.data.shards.writing, webdataset.utils; print(webdataset.utils.enforce_security)"
    for given in ("0", ""):
        environment = os.environ | {"WDS_SECURE": given}
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment
        )
        assert found.stdout == "True\n", found.stderr


def test_what_is_shown_may_be_read_in_part(packed: Path) -> None:
    """As in ``sltscale shards show FOLDER | head``."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sltscale.cli", "shards", "show", str(packed)]
    with os.fdopen(write) as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (141, "")


HOLD = """
import sys
from pathlib import Path
from sltscale.data.shards.parts import Parts
with Parts(Path(sys.argv[1]), "train").held([int(n) for n in sys.argv[2:]] or None):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_packer(out: Path, *shards: int) -> Iterator[None]:
    """A process that holds these shards of train (none: all of it)."""
    command = [sys.executable, "-c", HOLD, str(out), *map(str, shards)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        yield
        process.kill()


def test_two_packers_do_not_share_shards(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    half = "train-000001.tar.tmp"
    with another_packer(out):
        for part in (None, (0, 3)):
            with pytest.raises(InputError, match="another process is packing split train"):
                pack(corpus, out, part=part)
    with another_packer(out, 1, 4):  # as task 1 of 3 does
        (out / half).write_bytes(b"at work")
        for part in (None, (1, 3), (0, 2), (1, 2)):  # 4 is of 0/2, 1 of 1/2
            with pytest.raises(InputError, match="another process is packing split train"):
                pack(corpus, out, part=part)
        pack(corpus, out, part=(0, 3))
        pack(corpus, out, part=(2, 3))
        with pytest.raises(InputError, match="another process"):
            merge(out)
        assert (out / half).read_bytes() == b"at work"
        assert (out / "train-000000.tar").exists() and not (out / "train-000001.tar").exists()
    pack(corpus, out)
    assert contents(out) == contents(packed)


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
        for start, stop in cuts:
            id = f"{name}-{start}"
            rows.append(f"{id}\t{Path(name).stem}\t{stamp(start)}\t{stamp(stop)}\tText.\t\t\ttrain")
            expected.append((id, sum(start <= time < stop for time in times)))
    annotations = write_annotations(tmp_path / "a.tsv", rows)
    make_shards("openasl", [annotations], videos, tmp_path / "out", cutting=Cutting(SIZE), workers=1, progress=False)
    index = open_index(tmp_path / "out", "train")
    assert [(index.id(clip), int(index.frames[clip])) for clip in range(len(index))] == expected
    assert sum(count for _, count in expected) == 58 + 181 + 74
    assert [len(decode_clip(index.video_bytes(clip))) for clip in range(len(index))] == index.frames.tolist()
