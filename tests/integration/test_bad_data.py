"""Training on damaged shards: told to skip, every rank leaves out the same clips and says which."""

import json
import shutil
from pathlib import Path

import pytest
from launching import ROOT, Launcher

from sltscale.data.shards.index import Index, open_index

ARGUMENTS = ["--deepspeed", str(ROOT / "ds_configs/zero2.json")]


def flip(shards: Path, index: Index, clip: int) -> str:
    """Change one bit of a clip's video; its id."""
    path = shards / index.shards[index.shard[clip]]
    content = bytearray(path.read_bytes())
    content[int(index.offset[clip]) + int(index.size[clip]) // 2] ^= 4
    path.write_bytes(content)
    return index.id(clip)


def test_damaged_clips_are_left_out_by_all_ranks_and_named(corpus, launcher: Launcher, tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(corpus.shards, shards)
    index = open_index(shards, "train")
    damaged = [flip(shards, index, clip) for clip in (3, 17)]
    gone = flip(shards, open_index(shards, "test"), 0)
    command = [*ARGUMENTS, "--recipe", str(corpus.pretrain), "--run", str(run), "--data.shards", str(shards)]
    command += ["--train.epochs", "2"]

    stopped = launcher.run(ROOT / "sltscale/train.py", command, ranks=2)
    assert stopped.returncode == 2
    assert damaged[0] in stopped.output
    assert not run.exists()
    few = launcher.run(ROOT / "sltscale/train.py", [*command, "--bad-data", "skip"], ranks=2)
    assert few.returncode == 2
    assert f"2 of {len(index)} clips are damaged, more than data.max_bad_share 0.01 allows" in few.output

    command += ["--bad-data", "skip", "--data.max_bad_share", "0.2"]
    output = launcher.check(ROOT / "sltscale/train.py", command, ranks=2)
    assert "3 damaged clips are left out" in output
    rows = [json.loads(line) for line in (run / "bad_clips.jsonl").read_text().splitlines()]
    assert {(row["split"], row["id"]) for row in rows} == {("train", id) for id in damaged} | {("test", gone)}
    assert all("mp4 not as indexed" in row["reason"] for row in rows)
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert sum(row["clips"] for row in steps) == 2 * (len(index) - 2)
    metrics = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert metrics["clips"] == len(open_index(shards, "test")) - 1


@pytest.mark.slow
def test_a_run_goes_on_without_the_same_clips_alone(corpus, launcher: Launcher, tmp_path: Path) -> None:
    shards, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(corpus.shards, shards)
    index = open_index(shards, "train")
    whole = {path: path.read_bytes() for path in shards.glob("*.tar")}
    flip(shards, index, 5)
    command = [*ARGUMENTS, "--recipe", str(corpus.pretrain), "--run", str(run), "--data.shards", str(shards)]
    command += ["--bad-data", "skip", "--data.max_bad_share", "0.2", "--train.epochs", "1"]
    launcher.check(ROOT / "sltscale/train.py", command, ranks=1)
    (run / "STATUS.json").unlink()  # as if it had been killed before its end

    for path, content in whole.items():  # repaired: the clip stays out, the plan is the same
        path.write_bytes(content)
    output = launcher.check(ROOT / "sltscale/train.py", command, ranks=1)
    assert "1 damaged clips are left out" in output
    (run / "STATUS.json").unlink()

    flip(shards, index, 6)
    refused = launcher.run(ROOT / "sltscale/train.py", command, ranks=1)
    assert refused.returncode == 2
    assert "was begun with other shards" in refused.output
