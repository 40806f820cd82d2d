from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from openasl_corpus import contents, kill_after, pack, tool, undo_a_shard, write_annotations, write_corpus

from sltscale.cli import main
from sltscale.data.clips import Cutting
from sltscale.data.shards.index import open_index, splits
from sltscale.data.shards.merge import merge
from sltscale.data.shards.writing import make_shards
from sltscale.errors import InputError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def packed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(corpus, out)
    return out


def test_an_array_ends_with_the_bytes_of_one_run(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    reports = [pack(corpus, out, part=(number, 3)) for number in (2, 0, 1)]
    assert splits(out) == [] and not list(out.glob("*report*"))  # a part writes neither index nor report
    train = [next(report for report in part if report.split == "train") for part in reports]
    assert [report.shards for report in train] == [2, 2, 2] and sum(report.packed for report in train) == 18
    assert [report.summary() for report in merge(out)] == [report.summary() for report in pack(corpus, packed)]
    assert contents(out) == contents(packed)
    merge(out)
    assert contents(out) == contents(packed)


def test_more_tasks_than_shards(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    for number in reversed(range(7)):
        pack(corpus, out, part=(number, 7))
    merge(out)
    assert contents(out) == contents(packed)


def test_three_tasks_at_once(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    tasks = [subprocess.Popen(tool(corpus, out, "--part", f"{n}/3", "--workers", 1), **QUIET) for n in range(3)]
    assert [task.wait(240) for task in tasks] == [0, 0, 0]
    assert main(["shards", "merge", str(out)]) == 0
    assert contents(out) == contents(packed)


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@pytest.mark.slow
def test_three_tasks_killed_ten_times(tmp_path: Path, corpus: Path, packed: Path) -> None:
    out = tmp_path / "out"
    tasks = [tool(corpus, out, "--part", f"{number}/3", "--workers", 1) for number in range(3)]
    begun = time.monotonic()
    assert not kill_after(tasks[0], 300)
    longest = time.monotonic() - begun
    shutil.rmtree(out)
    moments = np.random.default_rng(3)
    kills = 0
    while kills < 10:
        number = int(moments.integers(3))
        others = [subprocess.Popen(task, **QUIET) for task in tasks if task is not tasks[number]]
        killed = kill_after(tasks[number], moments.uniform(0, longest))
        assert [other.wait(240) for other in others] == [0, 0]
        kills += killed
        if kills % 3 == 0 or not killed:
            undo_a_shard(out, int(moments.integers(6)))
    merging = [sys.executable, "-m", "sltscale.cli", "shards", "merge", str(out)]
    for task in tasks:
        assert not kill_after(task, 300)
    kill_after(merging, moments.uniform(0, longest))
    assert not kill_after(merging, 300)
    assert contents(out) == contents(packed)


def test_missing_parts_are_named(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    pack(corpus, out, part=(0, 3))
    with pytest.raises(
        InputError, match=r"4 of 6 shards of split train are not packed: 000001, 000002.*--part 1/3 and 2/3"
    ):
        merge(out)
    pack(corpus, out, part=(2, 3))
    with pytest.raises(InputError, match=r"2 of 6 shards of split train .*: 000001, 000004; .*--part 1/3, or once"):
        merge(out)
    assert splits(out) == []
    pack(corpus, out, part=(1, 3))
    (out / "train-000004.tar").unlink()
    with pytest.raises(InputError, match=r"train-000004.tar or its record .*pack again"):
        merge(out)


@pytest.mark.parametrize("name", ["train.settings.json", "train.reader.json"])
def test_damaged_parts_are_an_input_error(tmp_path: Path, packed: Path, name: str) -> None:
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    (out / "parts" / name).write_bytes(b"{")
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        merge(out)


def test_a_split_that_no_task_came_to_is_missed(tmp_path: Path, corpus: Path) -> None:
    """Killed while it packs train, a task has not come to dev; the merge must not take train for all there is."""
    out = tmp_path / "out"
    with subprocess.Popen(tool(corpus, out, "--part", "0/1", "--workers", 1), **QUIET) as task:
        while task.poll() is None and not list(out.glob("parts/*-*.json")):
            time.sleep(0.002)
        task.kill()
    for number in range(6):
        undo_a_shard(out, number)
    with pytest.raises(InputError, match="not packed"):
        merge(out)
    assert {path.name for path in out.glob("parts/*.settings.json")} == {"train.settings.json", "dev.settings.json"}


def test_verify_looks_at_tars_that_are_not_merged(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(corpus, tmp_path / "out", part=(0, 3))
    assert main(["shards", "verify", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "train-000003.tar: in no index; 4 clips, no foreign members" in printed.out
    assert "holds no index" in printed.err


def test_bad_parts(tmp_path: Path, corpus: Path) -> None:
    for part in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(InputError, match=f"part {part[0]}/{part[1]}: expected I/N"):
            pack(corpus, tmp_path / "out", part=part)
    done = subprocess.run(tool(corpus, tmp_path / "out", "--part", "3/3"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "expected I/N" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["merge", "report", "show", "verify"])
def test_empty_and_foreign_folders(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("x")
    (tmp_path / "file").touch()
    for name in ("none", "foreign", "file"):
        assert main(["shards", command, str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and name in printed.err
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["notes.txt"]


def test_nothing_usable(tmp_path: Path, corpus: Path) -> None:
    annotations = write_annotations(tmp_path / "a.tsv", ["x\tnoise\t\t\tNoise.\t\t\ttrain"])
    out = tmp_path / "out"
    make_shards("openasl", [annotations], corpus / "videos", out, cutting=Cutting(64), workers=1, part=(0, 1))
    with pytest.raises(InputError, match="nothing could be packed"):
        merge(out)
    assert json.loads((out / "report.json").read_text())["rejected"][0]["count"] == 1
    assert main(["shards", "report", str(out)]) == 0


@pytest.mark.slow
def test_a_million_clips_merge_in_little_memory(tmp_path: Path) -> None:
    """Made-up records of 2000 shards, whose tars are holes in the file system."""
    parts = tmp_path / "parts"
    parts.mkdir()
    shards, size = 2000, 500
    settings = {"corpus": "made up", "frame_size": 64, "clips": shards * size, "clips_per_shard": size}
    (parts / "train.settings.json").write_text(json.dumps(settings))
    (parts / "train.reader.json").write_text(json.dumps({"rejected": [], "notes": {}}))
    row = {"language": "en", "fps": [25, 1], "size": 10_000, "sha256": "ab" * 32, "crc32": [1, 2, 3]}
    row |= {"signer": "", "resolution": [1280, 720]}
    for shard in range(shards):
        name, rows = f"train-{shard:06d}.tar", []
        for number in range(size):
            clip, place = shard * size + number, number * 14_000
            own = {
                "id": f"video{clip // 90}-{clip}",
                "key": f"video{clip // 90}-{clip}",
                "source": f"v{clip // 90}.mp4",
            }
            text = f"Sentence number {clip % 900_000} about the weather, as it was."
            rows.append(
                row | own | {"text": text, "frames": 20 + clip % 300, "offset": place, "record": [place, place]}
            )
        content = {"shard": {"name": name, "bytes": size * 14_000, "sha256": "cd" * 32, "rows": rows}, "rejected": []}
        (parts / f"train-{shard:06d}.json").write_text(json.dumps(content))
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * 14_000)
    command = "import sys\nfrom pathlib import Path\nfrom sltscale.cli import main\nassert main(sys.argv[1:]) == 0\n"
    command += "print(int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) // 1024)"
    done = subprocess.run(
        [sys.executable, "-c", command, "shards", "merge", str(tmp_path)], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2000
    index = open_index(tmp_path, "train")
    assert len(index) == shards * size and index.columns_intact()
    assert index.id(999_999) == "video11111-999999"
