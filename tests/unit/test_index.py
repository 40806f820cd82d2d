from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from source_videos import write_video

from sltscale.data.clips import Clip, Cutting
from sltscale.data.shards.columns import ColumnFile, write_columns
from sltscale.data.shards.index import Index, Row, Shard, open_index, splits, write_index
from sltscale.data.shards.verify import check_shards, verify
from sltscale.data.shards.writing import write_shards
from sltscale.errors import InputError

CLIPS = 7


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dev: 7 clips in 3 shards."""
    folder = tmp_path_factory.mktemp("original")
    source = write_video(folder / "v.mp4", 30)
    clips = [Clip(f"id.{n}", source, None, None, f"Größe {n}", "de", "dev", n, signer=f"s{n}") for n in range(CLIPS)]
    write_shards(
        clips, [], folder / "shards", split="dev", corpus="c", cutting=Cutting(64), clips_per_shard=3, progress=False
    )
    return folder / "shards"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "shards"))


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def test_columns(folder: Path) -> None:
    index = open_index(folder, "dev")
    assert splits(folder) == ["dev"] and len(index) == CLIPS
    assert index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert index.frames.tolist() == [30] * CLIPS and index.fps.tolist() == [[25, 1]] * CLIPS
    assert index.texts() == [f"Größe {n}" for n in range(CLIPS)]
    assert index.id(np.int64(6)) == "id.6" and index.key(6) == "id_6" and index.language(0) == "de"
    assert (index.corpus, index.frame_size, index.split) == ("c", 64, "dev")
    assert index.shards == [f"dev-{n:06d}.tar" for n in range(3)]
    assert index.seconds == pytest.approx(CLIPS * 30 / 25)
    assert index.source(3) == "v.mp4" and index.signer(3) == "s3" and index.resolution[3].tolist() == [64, 48]
    assert index.sources() == ["v.mp4"] * CLIPS and index.languages() == ["de"]
    assert index.row(3)["shard"] == "dev-000001.tar" and index.row(3)["fps"] == [25, 1]
    np.testing.assert_array_equal(index.offset, load_file(index.path)["offset"])


def read_first(index: Index) -> bytes:
    return index.video_bytes(0)


def test_travels_to_other_processes(folder: Path) -> None:
    index = open_index(folder, "dev")
    expected = index.video_bytes(0)
    assert pickle.loads(pickle.dumps(index)).video_bytes(0) == expected  # noqa: S301
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_first, [index] * 4) == [expected] * 4


MADE_UP = """
import re, sys
from pathlib import Path
from sltscale.data.shards.index import Row, Shard, open_index, write_index

def resident(which):
    return int(re.search(which + r":\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def shards(clips):
    for number in range(clips // 500):
        rows = [
            Row(f"vid{i // 90}-{i}.x", f"vid{i // 90}-{i}_x", f"Sentence number {i} about the weather, as it was.",
                "de" if i % 3 else "en", 20 + i % 300, (30000, 1001), 14000 * (i % 500), 12000, f"{i:064x}",
                (14000 * (i % 500), 14000 * (i % 500 + 1)), (i, 2, 3), f"vid{i // 90}.mp4", f"s{i % 7}", (1280, 720))
            for i in range(number * 500, (number + 1) * 500)
        ]
        yield Shard(f"train-{number:06d}.tar", 7_000_000, "00" * 32, rows)

folder, clips = Path(sys.argv[1]), int(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, mapped_before = resident("VmRSS"), resident("RssFile")
if sys.argv[3] == "write":
    write_index(folder, "train", shards(clips), corpus="made up", frame_size=64)
    print(resident("VmHWM") - before)
else:
    index = open_index(folder, "train")
    opened, mapped = resident("VmHWM") - before, resident("RssFile") - mapped_before
    assert len(index) == clips and index.columns_intact() and index.digest
    print(opened, mapped, resident("VmHWM") - before)
"""


@pytest.mark.parametrize("clips", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_many_clips_in_little_memory(tmp_path: Path, clips: int) -> None:
    """In MiB: what writing, opening and checking add to a process."""

    def made_up(what: str) -> list[float]:
        command = [sys.executable, "-c", MADE_UP, str(tmp_path), str(clips), what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        return [float(number) for number in done.stdout.split()]

    (written,) = made_up("write")
    path = tmp_path / "train.index.safetensors"
    size = path.stat().st_size / 2**20
    assert size > clips * 200 / 2**20 and written < 3 * size
    opened, mapped, checked = made_up("read")
    # The header only. A byte that is looked at may map 2 MiB of the page cache, with kernels of large folios.
    assert opened - mapped < 8 and mapped < size / 2
    assert checked < opened + size / 4  # in pieces, not through the map
    index = open_index(tmp_path, "train")
    for name in ("offset", "sha256", "record", "resolution"):
        column = getattr(index, name)
        assert not column.flags.owndata and not column.flags.writeable  # a view of the mapped file, not a copy
    last = clips - 1
    assert index.id(last) == f"vid{last // 90}-{last}.x" and index.source(last) == f"vid{last // 90}.mp4"
    assert index.sha256[last].tobytes().hex() == f"{last:064x}" and index.shard[last] == clips // 500 - 1
    assert index.languages() == ["de", "en"] and index.language(0) == "en" and index.language(1) == "de"
    np.testing.assert_array_equal(index.clips_of("en"), np.arange(0, clips, 3))
    assert index.texts()[last] == index.text(last) and index.signers()[last] == index.signer(last)
    stored = load_file(path)
    assert stored["crc32"].shape == (clips, 3) and stored["fps"].dtype == np.int32
    np.testing.assert_array_equal(stored["frames"], index.frames)


def test_order_of_languages_does_not_depend_on_the_clips(tmp_path: Path) -> None:
    row = Row("id", "key", "text", "de", 9, (25, 1), 0, 9, "00" * 32, (0, 9), (1, 2, 3))
    shards = [
        Shard("a.tar", 9, "00" * 32, [replace(row, language=language) for language in ("zh", "de")]),
        Shard("b.tar", 9, "00" * 32, [replace(row, language=language) for language in ("en", "zh")]),
    ]
    write_index(tmp_path, "train", iter(shards), corpus="c", frame_size=64)
    index = open_index(tmp_path, "train")
    assert index.languages() == ["de", "en", "zh"]
    assert [index.language(clip) for clip in range(4)] == ["zh", "de", "en", "zh"]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_index_of_an_older_format_is_refused(folder: Path) -> None:
    path = folder / "dev.index.safetensors"
    path.write_bytes(path.read_bytes().replace(rb"\"format\": 2", rb"\"format\": 1"))
    with pytest.raises(InputError, match="index format 1, this version reads 2; pack again"):
        open_index(folder, "dev")


def test_missing_and_damaged_indexes_are_input_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no split 'train'; it has dev"):
        open_index(folder, "train")
    with pytest.raises(InputError, match="holds no index"):
        open_index(tmp_path / "nowhere", "train")
    path = folder / "dev.index.safetensors"
    content = path.read_bytes()
    for broken in (b"", content[:4], content[:100], content[:-10], b"\xff" * 500, b"x" + content[1:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="damaged"):
            open_index(folder, "dev")


def test_intact_shards_have_no_defects(folder: Path) -> None:
    assert verify(open_index(folder, "dev")) == []
    check_shards(open_index(folder, "dev"), 0, 1)


def damage(folder: Path, kind: str) -> tuple[str, str]:
    """Damage clip 4 (second of shard 1), or what the kind says; returns the expected (key, part of the reason)."""
    index = open_index(folder, "dev")
    tar = folder / index.shards[1]
    begin, end = index.record[4].tolist()
    mp4, size = int(index.offset[4]), int(index.size[4])
    positions = {
        "json header": (begin + 3, "json"),
        "json": (begin + 512 + 5, "json"),
        "mp4 header": (mp4 - 300, "mp4"),
        "mp4 first byte": (mp4, "mp4"),
        "mp4 last byte": (mp4 + size - 1, "mp4"),
        "mp4 padding": (mp4 + size, "mp4"),
        "txt header": (end - 1024 + 100, "txt"),
        "txt": (end - 512, "txt"),
    }
    if kind in positions:
        flip(tar, positions[kind][0])
        return "id_4", positions[kind][1]
    if kind == "missing":
        tar.unlink()
        return "id_3", "No such file"
    if kind == "truncated":
        with tar.open("r+b") as file:
            file.truncate(mp4 + 10)
        return "id_4", f"has {mp4 + 10} bytes instead of {index.shard_bytes[1]}"
    if kind == "empty":
        tar.write_bytes(b"")
        return "id_3", "has 0 bytes"
    if kind == "not a tar":
        tar.write_bytes(np.random.default_rng(0).bytes(index.shard_bytes[1]))
        return "id_3", "not a tar file"
    if kind == "zeroed block":
        with tar.open("r+b") as file:
            file.seek(begin)
            file.write(bytes(4096))
        return "id_4", "json, mp4"
    if kind == "longer":
        with tar.open("ab") as file:
            file.write(b"x")
        return "", "bytes instead of"
    assert kind == "end of archive"
    flip(tar, index.shard_bytes[1] - 1)
    return "", "behind its last clip"


KINDS = [
    *("json header", "json", "mp4 header", "mp4 first byte", "mp4 last byte", "mp4 padding", "txt header", "txt"),
    *("missing", "truncated", "empty", "not a tar", "zeroed block", "longer", "end of archive"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_by_shard_and_clip(folder: Path, kind: str) -> None:
    check_shards(open_index(folder, "dev"), 0, 1)  # a remembered success must not hide what happens later
    key, reason = damage(folder, kind)
    index = open_index(folder, "dev")
    (defect,) = verify(index)
    assert (defect.shard, defect.key) == ("dev-000001.tar", key)
    assert reason in defect.reason
    assert defect.id == key.replace("_", ".")
    with pytest.raises(InputError, match=r"dev-000001\.tar") as caught:
        check_shards(index, 0, 1)
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_reading_a_damaged_clip_is_an_input_error(folder: Path) -> None:
    damage(folder, "mp4 first byte")
    index = open_index(folder, "dev")
    with pytest.raises(InputError, match=r"dev-000001.tar.*id_4"):
        index.video_bytes(4)
    assert index.video_bytes(3) and index.video_bytes(5)
    damage(folder, "missing")
    with pytest.raises(InputError, match="No such file"):
        open_index(folder, "dev").video_bytes(3)


@pytest.mark.parametrize("size", [1 << 50, -5])
def test_a_false_index_cannot_ask_for_more_than_the_shard_holds(folder: Path, size: int) -> None:
    """Its checksum holds, as whoever wrote it made that too."""
    file = ColumnFile(folder / "dev.index.safetensors")
    columns = {name: np.array(column) for name, column in file.columns.items()}
    columns["size"][0], columns["record"][1] = size, (0, size)
    write_columns(file.path, columns, file.metadata)
    index = open_index(folder, "dev")
    with pytest.raises(InputError, match="is not the one in the index"):
        index.video_bytes(0)
    assert [defect.shard for defect in verify(index)] == index.shards[:1]


@pytest.mark.parametrize(
    ("column", "value"), [("shard", 99), ("shard", -1), ("language", 7), ("frames", 0), ("fps", (0, 0))]
)
def test_an_index_with_impossible_numbers_is_refused(folder: Path, column: str, value: object) -> None:
    file = ColumnFile(folder / "dev.index.safetensors")
    columns = {name: np.array(numbers) for name, numbers in file.columns.items()}
    columns[column][1] = value
    write_columns(file.path, columns, file.metadata)
    with pytest.raises(InputError, match=f"column {column} has numbers"):
        open_index(folder, "dev")


def test_a_flipped_byte_in_the_index_itself(folder: Path) -> None:
    path = folder / "dev.index.safetensors"
    flip(path, path.read_bytes().index("Größe 3".encode()) + 8)
    (defect,) = verify(open_index(folder, "dev"))
    assert defect.shard == path.name
    with pytest.raises(InputError, match="index itself"):
        check_shards(open_index(folder, "dev"), 1, 2)


def test_ranks_share_the_reading_and_remember(folder: Path) -> None:
    damage(folder, "txt")
    check_shards(open_index(folder, "dev"), 0, 2)  # shards 0 and 2
    with pytest.raises(InputError, match=r"dev-000001\.tar"):
        check_shards(open_index(folder, "dev"), 1, 2)
    # Remembered by size and time of modification: the same stamp is not read again, a new one is.
    intact = folder / "dev-000000.tar"
    before = intact.stat()
    flip(intact, 600)
    with pytest.raises(InputError):
        check_shards(open_index(folder, "dev"), 0, 2)
    os.utime(intact, ns=(before.st_atime_ns, before.st_mtime_ns))
    check_shards(open_index(folder, "dev"), 0, 2)
    assert len(verify(open_index(folder, "dev"))) == 2
