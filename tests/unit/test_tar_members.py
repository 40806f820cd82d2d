from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sltscale.data.shards.tar_members import TarScan, scan

EXECUTABLE = ["pyd", "pkl", "pickle", "pth", "npy", "npz", "cls", "mp", "cbor"]


def member(
    name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, **facts: str
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = len(content) if kind == tarfile.REGTYPE else 0
    for fact, value in facts.items():
        setattr(info, fact, value)
    return info, content


def write(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def clip(key: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.json", b"{}"), member(f"{key}.mp4", b"m" * 1500), member(f"{key}.txt", b"")]


class Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_hostile_tar_is_counted_and_nothing_happens(tmp_path: Path, format: int) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Runs(canary))
    array = io.BytesIO()
    np.save(array, np.array([Runs(canary)], dtype=object), allow_pickle=True)
    hostile = [
        *(member(f"k.{extension}", payload) for extension in EXECUTABLE),
        member("object.npy", array.getvalue()),
        member("../x.json", payload),
        member("/etc/x", payload),
        member("sub/k.mp4", payload),
        member("k\\..\\x.mp4", payload),
        member("link.mp4", kind=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.mp4", kind=tarfile.LNKTYPE, linkname="../x"),
        member("null", kind=tarfile.CHRTYPE),
        member("disk", kind=tarfile.BLKTYPE),
        member("fifo.txt", kind=tarfile.FIFOTYPE),
        member("folder", kind=tarfile.DIRTYPE),
    ]
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "x.tar", [*clip("a"), *hostile, *clip("b-_9")], format)
    pickle.loads(payload)  # noqa: S301
    assert canary.exists()  # the payload does what it should
    canary.unlink()
    before = sorted(tmp_path.rglob("*"))
    found = scan(path)
    assert sorted(tmp_path.rglob("*")) == before and not canary.exists()
    executable = {f".{extension}, which loading may execute": 1 for extension in EXECUTABLE}
    executable[".npy, which loading may execute"] += 1
    others = {"a path for a name": 4, "a link": 2, "a device": 2, "a pipe": 1, "a folder": 1}
    assert found == TarScan(2, executable | others)
    assert sum(found.foreign.values()) == len(hostile)
    assert str(found).startswith("20 foreign members: 4 x a path for a name, 2 x ")


def test_a_clean_tar_has_no_foreign_members(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", [part for number in range(30) for part in clip(f"-k_{number}")])
    assert scan(path) == TarScan(30, {}) and str(scan(path)) == "no foreign members"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("k.webm", "another extension"),
        ("k", "another extension"),
        ("1nFdgokPwBw-00:00:14.100-00:00:17.266.mp4", "another extension"),
        ("k.json.pkl", ".pkl, which"),
        ("k.PKL", ".pkl, which"),
        ("k.pkl.gz", ".pkl, which"),
        ("k.pyd.json", ".pyd, which"),
        (".mp4", "a key"),
        ("a b.mp4", "a key"),
        ("k\n.mp4", "a key"),
        ("\u00fc.txt", "a key"),
        ("k" * 201 + ".mp4", "a key"),
        ("..", "a path"),
        ("a" * 150 + "/../" + "b" * 150 + ".mp4", "a path"),
        ("x" * 70 + "/" + "y" * 90 + ".mp4", "a path"),
    ],
)
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_are_no_clip_member(tmp_path: Path, name: str, reason: str, format: int) -> None:
    found = scan(write(tmp_path / "x.tar", [member(name), *clip("k" * 200)], format))
    assert found.clips == 1 and list(found.foreign.values()) == [1]
    assert next(iter(found.foreign)).startswith(reason)
    assert name not in str(found) and "\n" not in str(found)  # a name may hold anything, also for a terminal


def test_huge_headers_are_passed_over(tmp_path: Path) -> None:
    members = [member("k.mp4", b"y" * 700)]
    members[0][0].pax_headers = {"comment": "c" * (10 << 20)}
    assert scan(write(tmp_path / "x.tar", members)) == TarScan(1, {"an extended header over 1 MiB": 1})
    members[0][0].pax_headers = {"comment": "c" * 1000, "path": "../k.mp4"}
    assert scan(write(tmp_path / "y.tar", members)) == TarScan(0, {"a path for a name": 1})


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[257:265], block[148:156] = b"ustar\x0000", b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("content", "clips", "reason"),
    [
        (b"", 0, "not a tar header"),
        (b"x", 0, "not a tar header"),
        (np.random.default_rng(0).bytes(5000), 0, "not a tar header"),
        (header(b"k.mp4", b"00000000010\0") + b"y" * 8, 1, "a member that the end of the file cuts off"),
        (header(b"k.mp4", b"77777777777\0"), 1, "a member that the end of the file cuts off"),
        (header(b"k.mp4", b"\x80" + b"\xff" * 11), 1, "a member that the end of the file cuts off"),
        (header(b"k.mp4", b"\xff" * 12), 0, "not a tar header"),
        (header(b"k.mp4", b"-0000000001\0"), 0, "not a tar header"),
        (header(b"k.mp4", b"00000000000\0") + b"\1" * 512, 1, "not a tar header"),
        (header(b"h", b"00000002000\0", b"x") + b"1024 size=-7\n".ljust(1024, b"."), 0, ""),
        (header(b"h", b"00000000020\0", b"x") + b"99999999999999 =".ljust(512, b"\0"), 0, ""),
        (header(b"k.mp4", b"00000000000\0").replace(b"k.mp4", b"j.mp4"), 0, "not a tar header"),
        (header(b"l", b"00000001000\0", b"2") + header(b"k.mp4", b"00000000000\0"), 1, "a link"),
        (header(b"h", b"77777777777\0", b"x"), 0, "an extended header over 1 MiB"),
    ],
)
def test_broken_tars_end_the_walk(tmp_path: Path, content: bytes, clips: int, reason: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    found = scan(path)
    assert found.clips == clips
    assert next(iter(found.foreign), "").startswith(reason) and bool(found.foreign) == bool(reason)


def test_a_pax_size_counts_before_the_header_s(tmp_path: Path) -> None:
    """Or the walk would take the content for headers, which other readers do not."""
    hidden = header(b"evil.pkl", b"00000000000\0")
    record = b"12 size=512\n"
    pax = header(b"h", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(pax + header(b"k.mp4", b"00000000000\0") + hidden + bytes(1024))
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["k.mp4"]
    assert scan(path) == TarScan(1, {})


def test_a_long_extended_header_takes_linear_time(tmp_path: Path) -> None:
    records = b"9 a=bbbb\n" * 110_000
    path = tmp_path / "x.tar"
    path.write_bytes(
        header(b"h", b"%011o\0" % len(records), b"x") + records.ljust(-(-len(records) // 512) * 512, b"\0")
    )
    assert scan(path) == TarScan(0, {})


MANY = """
import re, sys
from pathlib import Path
from sltscale.data.shards.tar_members import scan

def resident(which):
    return int(re.search(which + r":\\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])

before = resident("VmRSS")
found = scan(Path(sys.argv[1]))
print(found.clips, sum(found.foreign.values()), resident("VmHWM") - before)
"""


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_very_many_members_take_no_memory(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        for number in range(count):
            file.write(header(b"%d.mp4" % number if number % 2 else b"../%d" % number, b"00000000001\0") + b"y" * 512)
    done = subprocess.run([sys.executable, "-c", MANY, path], capture_output=True, text=True, timeout=600, check=True)
    clips, foreign, kilobytes = map(int, done.stdout.split())
    assert (clips, foreign) == (count // 2, count // 2)
    assert kilobytes < 20_000
