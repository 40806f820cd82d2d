"""slurm/shards.sbatch: an array of writers and a merge that waits for them leave the bytes of a single writer."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
Command = Callable[..., subprocess.CompletedProcess[str]]
PARTS = 3


@pytest.fixture(scope="module")
def packing(command: Command, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of tools/make_shards.py for four shards, but for --out."""
    folder = tmp_path_factory.mktemp("source")
    drawn = command("tools/make_synthetic.py", "--out", folder, "--clips", "40", "--seed", "2")
    assert drawn.returncode == 0, drawn.stderr
    read = ["--corpus", "openasl", "--annotations", str(folder / "annotations.tsv"), "--videos", str(folder / "videos")]
    return [*read, "--language", "de", "--frame-size", "64", "--clips-per-shard", "10", "--workers", "1"]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of all that is for readers: tars, indexes, reports."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_an_array_and_its_merge_give_the_bytes_of_one_writer(
    cluster: Cluster, command: Command, packing: list[str], tmp_path: Path
) -> None:
    alone = command("tools/make_shards.py", *packing, "--out", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr

    out, log = tmp_path / "array", tmp_path / "log"
    options = ["--output", f"{tmp_path}/log-%a", "slurm/shards.sbatch"]
    array = cluster.submit("--array", f"0-{PARTS - 1}", *options, str(PARTS), *packing, "--out", out)
    after = ["--dependency", f"afterok:{array}", "--output", str(log), "slurm/shards.sbatch", "merge", str(out)]
    merge = cluster.submit(*after)
    assert cluster.show(merge)["JobState"] == "PENDING"

    assert cluster.wait(merge, 150, log)["JobState"] == "COMPLETED", log.read_text()
    for part in range(PARTS):
        assert f"part {part}/{PARTS} is packed" in (tmp_path / f"log-{part}").read_text()
    assert len([name for name in digests(out) if name.endswith(".tar")]) >= PARTS
    assert digests(out) == digests(tmp_path / "one")


def test_an_interrupted_writer_is_requeued_and_goes_on(cluster: Cluster, packing: list[str], tmp_path: Path) -> None:
    """By the signal that comes before the time limit, then by the one of a job with a higher priority."""
    out, log = tmp_path / "array", tmp_path / "log"
    job = cluster.submit("--array", "0", "--output", log, "slurm/shards.sbatch", "1", *packing, "--out", out)
    for restarts, number in enumerate(("INT", "TERM"), start=1):
        tars = len(list(out.glob("parts/*.json"))) if out.exists() else 0
        wait_for(lambda tars=tars: len(list(out.glob("parts/*.json"))) > tars, 600, "another shard", log.read_text)
        cluster("scancel", f"--signal={number}", f"{job}_0")
        wait_for(lambda restarts=restarts: cluster.show(f"{job}_0")["Restarts"] == str(restarts), 600, "its requeue")
    assert cluster.wait(f"{job}_0", 90, log)["JobState"] == "COMPLETED", log.read_text()
    assert "part 0/1 is packed" in log.read_text()
