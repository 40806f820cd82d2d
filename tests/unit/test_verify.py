from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from sltscale.data.shards.index import BLOCK, Index, Row, Shard, open_index, padded, record_crc32, write_index
from sltscale.data.shards.verify import Defect, bad_clips, check_shards, verify, verify_folder
from sltscale.errors import InputError

CLIPS_PER_SHARD = 3
SHARDS = 8


def write_shard(path: Path, number: int) -> Shard:
    """A tar as the writer lays it out, of clips that are random bytes."""
    rng = np.random.default_rng(number)
    clips = range(number * CLIPS_PER_SHARD, (number + 1) * CLIPS_PER_SHARD)
    contents = [{"json": b'{"id": %d}' % clip, "mp4": rng.bytes(3000 + clip), "txt": b"sentence"} for clip in clips]
    begins = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for clip, members in zip(clips, contents, strict=True):
            begins.append(tar.offset)
            for extension, content in members.items():
                info = tarfile.TarInfo(f"k{clip}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        begins.append(tar.offset)
    data = path.read_bytes()
    rows = []
    for clip, members, begin, end in zip(clips, contents, begins, begins[1:], strict=False):
        mp4 = begin + BLOCK + padded(len(members["json"])) + BLOCK
        size = len(members["mp4"])
        rows.append(
            Row(
                id=f"id.{clip}",
                key=f"k{clip}",
                text="sentence",
                language="en",
                frames=5,
                fps=(25, 1),
                offset=mp4,
                size=size,
                sha256=hashlib.sha256(members["mp4"]).hexdigest(),
                record=(begin, end),
                crc32=record_crc32(data[begin:end], mp4 - begin, size),
            )
        )
    return Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """dev: shards 0 to 7 of three clips each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shards = [write_shard(folder / f"dev-{number:06d}.tar", number) for number in range(SHARDS)]
    write_index(folder, "dev", shards, corpus="c", frame_size=64)
    for tar in folder.glob("*.tar"):
        os.utime(tar, (1e9, 1e9))  # what is changed later has another time, however coarse the clock of files
    return folder


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def cut(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.truncate(position)


def flip(path: Path, position: int) -> None:
    overwrite(path, position, bytes([path.read_bytes()[position] ^ 0x10]))


# Damage to a shard, given its path, its index and the number of its second clip: which of its three clips are bad then,
# and what is said of the first of them.
DAMAGES: dict[str, tuple[Callable[[Path, Index, int], object], tuple[int, ...], str]] = {
    "truncated tar": (lambda tar, index, clip: cut(tar, index.offset[clip] + 100), (1, 2), "the file ends"),
    "zeroed block": (lambda tar, index, clip: overwrite(tar, index.offset[clip], bytes(BLOCK)), (1,), "mp4 not as"),
    "flipped byte": (lambda tar, index, clip: flip(tar, index.record[clip, 1] - BLOCK), (1,), "txt not as indexed"),
    "missing shard": (lambda tar, *_: tar.unlink(), (0, 1, 2), "No such file"),
    "empty file": (lambda tar, *_: tar.write_bytes(b""), (0, 1, 2), "has 0 bytes instead of"),
    "not a tar": (lambda tar, *_: tar.write_bytes(b"<html>" * 3000), (0, 1, 2), "not a tar file"),
    "cut at a member": (lambda tar, index, clip: cut(tar, index.offset[clip] - BLOCK), (1, 2), "the file ends"),
    "cut at a clip": (lambda tar, index, clip: cut(tar, index.record[clip, 0]), (1, 2), "the file ends"),
    "flipped header": (lambda tar, index, clip: flip(tar, index.record[clip, 0] + 3), (1,), "json not as indexed"),
    "a folder": (lambda tar, *_: (tar.unlink(), tar.mkdir()), (0, 1, 2), "Is a directory"),
    "longer": (lambda tar, *_: tar.write_bytes(tar.read_bytes() + b"x"), (), "bytes instead of"),
    "flipped at the end": (lambda tar, *_: flip(tar, tar.stat().st_size - 1), (), "behind its last clip"),
}
SEVEN = list(DAMAGES)[:7]


def damage(folder: Path, kind: str, shard: int) -> list[int]:
    """The clips that are bad then."""
    index = open_index(folder, "dev")
    first = shard * CLIPS_PER_SHARD
    do, bad, _ = DAMAGES[kind]
    do(folder / index.shards[shard], index, first + 1)
    return [first + clip for clip in bad]


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_is_named_by_all_three(folder: Path, kind: str) -> None:
    assert bad_clips(open_index(folder, "dev")) == []  # a remembered success must not hide what happens later
    expected, reason = damage(folder, kind, 4), DAMAGES[kind][2]
    index = open_index(folder, "dev")
    (defect,) = verify(index)
    key, id = (f"k{expected[0]}", f"id.{expected[0]}") if expected else ("", "")
    assert (defect.shard, defect.key, defect.id) == ("dev-000004.tar", key, id) and reason in defect.reason
    with pytest.raises(InputError) as caught:
        check_shards(index, 0, 1)
    assert str(defect) in str(caught.value) and "\n" not in str(caught.value)
    found = bad_clips(index)
    assert [bad.clip for bad in found] == expected
    assert all((bad.shard, bad.key, bad.id) == ("dev-000004.tar", f"k{bad.clip}", f"id.{bad.clip}") for bad in found)
    assert all(bad.reason in defect.reason or bad.reason.startswith(("the file ends", "json")) for bad in found)


def test_seven_at_once(folder: Path) -> None:
    expected = [clip for shard, kind in enumerate(SEVEN) for clip in damage(folder, kind, shard)]
    index = open_index(folder, "dev")
    assert [defect.shard for defect in verify(index)] == index.shards[:7]
    assert [bad.clip for bad in bad_clips(index)] == expected
    # Each rank reads its own part of the shards.
    shares = [[bad.clip for bad in bad_clips(index, rank, 3)] for rank in range(3)]
    assert sorted(clip for share in shares for clip in share) == expected
    with pytest.raises(InputError, match=r"dev-000000\.tar.*\(and 6 more\)"):
        check_shards(index, 0, 1)


def test_clips_that_are_not_bad_can_be_read(folder: Path) -> None:
    for shard, kind in enumerate(SEVEN):
        damage(folder, kind, shard)
    index = open_index(folder, "dev")
    bad = {clip.clip for clip in bad_clips(index)}
    for clip in range(len(index)):
        if clip not in bad:
            assert hashlib.sha256(index.video_bytes(clip)).digest() == index.sha256[clip].tobytes()


def test_what_was_seen_is_remembered_for_both(folder: Path) -> None:
    check_shards(open_index(folder, "dev"), 0, 1)
    (tar,) = folder.glob("*3.tar")
    before = tar.stat()
    flip(tar, 5000)
    assert len(bad_clips(open_index(folder, "dev"))) == 1
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bad_clips(open_index(folder, "dev")) == []  # the stamp is the old one: not read again
    assert len(verify(open_index(folder, "dev"))) == 1


def test_a_damaged_index_has_no_good_clips(folder: Path) -> None:
    path = open_index(folder, "dev").path
    flip(path, path.read_bytes().rindex(b"sentence"))
    (defect,) = verify(open_index(folder, "dev"))
    assert defect.shard == path.name
    with pytest.raises(InputError, match=r"dev\.index\.safetensors: the index itself is damaged"):
        bad_clips(open_index(folder, "dev"))


def hostile(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("a.mp4", "b.pkl", "../c.mp4"):
            tar.addfile(tarfile.TarInfo(name))


def test_foreign_members_are_counted(folder: Path) -> None:
    hostile(folder / "dev-000002.tar")
    (defect,) = verify(open_index(folder, "dev"))
    assert defect.key == "k6"
    assert defect.reason.endswith("; 2 foreign members: 1 x .pkl, which loading may execute, 1 x a path for a name")
    assert defect.reason.startswith("has 10240 bytes instead of")


def test_tars_without_an_index(folder: Path, tmp_path: Path) -> None:
    assert verify_folder(folder) == []
    hostile(folder / "other.tar")
    (folder / "empty.tar").write_bytes(b"")
    (folder / "folder.tar").mkdir()
    members = "2 foreign members: 1 x .pkl, which loading may execute, 1 x a path for a name"
    assert verify_folder(folder) == [
        "empty.tar: in no index; 0 clips, 1 foreign members: 1 x not a tar header (what follows it is not read)",
        f"other.tar: in no index; 1 clips, {members}",
    ]
    write_shard(tmp_path / "alone.tar", 0)
    assert verify_folder(tmp_path) == ["alone.tar: in no index; 3 clips, no foreign members"]
    assert verify_folder(tmp_path / "nowhere") == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Not onto the terminal."""


@pytest.fixture
def behind_url(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The index of the folder, read through a URL."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra: remote)")
    monkeypatch.setenv("SLTSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield open_index(f"http://127.0.0.1:{server.server_port}", "dev")
    server.shutdown()
    server.server_close()
    thread.join()


def test_sizes_are_compared_behind_a_url(folder: Path, behind_url: Index, tmp_path: Path) -> None:
    check_shards(behind_url, 0, 1)
    before = sorted(tmp_path.glob("cache/*/*"))  # the index
    assert bad_clips(behind_url) == [] and not (folder / ".verified.json").exists()
    damage(folder, "flipped byte", 0)
    check_shards(behind_url, 0, 1)  # found when the clip is read
    expected = damage(folder, "truncated tar", 1) + damage(folder, "missing shard", 2) + damage(folder, "longer", 3)
    assert [bad.clip for bad in bad_clips(behind_url)] == expected
    assert [bad.clip for bad in bad_clips(behind_url, 1, 3)] == expected[:2]
    with pytest.raises(
        InputError, match=r"dev-000001\.tar, clip k4 .*bytes instead of .*; the file ends.*\(and 2 more\)"
    ):
        check_shards(behind_url, 0, 1)
    assert sorted(tmp_path.glob("cache/*/*")) == before


def test_a_damaged_copy_of_an_index_is_named(behind_url: Index) -> None:
    assert verify_folder(behind_url.folder) == []
    flip(behind_url.path, behind_url.path.read_bytes().rindex(b"sentence"))
    with pytest.raises(InputError, match=rf"dev\.index\.safetensors: the index itself.*copy {behind_url.path}\)"):
        bad_clips(open_index(behind_url.folder, "dev"))


def test_verify_reads_every_byte_behind_a_url_too(folder: Path, behind_url: Index) -> None:
    assert verify(behind_url) == []
    damage(folder, "flipped byte", 0)
    damage(folder, "missing shard", 2)
    damage(folder, "flipped at the end", 5)
    assert verify(behind_url) == [
        Defect("dev-000000.tar", "k1", "id.1", "txt not as indexed"),
        Defect("dev-000002.tar", "k6", "id.6", "cannot be read: No such file"),
        Defect("dev-000005.tar", "", "", "differs from the index behind its last clip"),
    ]
