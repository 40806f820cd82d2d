from __future__ import annotations

import builtins
import gzip
import io
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sltscale.data.annotations import labels
from sltscale.data.annotations.labels import label_images, read_labels
from sltscale.data.annotations.tables import BadRow
from sltscale.errors import InputError

CLIPS = {
    "train/ä": {"name": "train/ä", "gloss": ["A", "B"], "text": "größe", "length": 3, "imgs_path": ["a/1.png"] * 3},
    "b": {"text": "x" * 300, "imgs_path": [], "length": 70_000, "more": {"t": 0.5, "u": None, "v": True, "w": -1}},
}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_labels(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_labels_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "labels.train"
    path.write_bytes(gzip.compress(pickle.dumps(CLIPS, protocol)))
    assert labels.is_labels(path)
    assert read_labels(path) == CLIPS
    assert list(read_labels(path)) == list(CLIPS)


class Attack:
    """Its pickle calls ``function`` when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def test_nothing_is_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    attacks = [
        Attack(os.system, f"touch {canary}"),
        Attack(builtins.eval, f"open({str(canary)!r}, 'w')"),
        Attack(builtins.exec, f"open({str(canary)!r}, 'w')"),
        Attack(open, str(canary), "w"),
        Attack(getattr, Attack(__import__, "os"), "getcwd"),
        Attack(subprocess.Popen, ["touch", str(canary)]),
    ]
    for attack in attacks:
        for content in (attack, {"a": {"text": attack}}, {"a": {"text": "x", "imgs_path": [[attack]]}}):
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                dumped = pickle.dumps(content, protocol)
                assert "could run code" in refusal(tmp_path / "labels.train", gzip.compress(dumped))
                # The second wall, were the first one not there.
                with pytest.raises((pickle.UnpicklingError, AttributeError, TypeError)):
                    labels._Unpickler(io.BytesIO(dumped)).load()
    # Names by number (the extension registry) and by a reader's own rule.
    for code in (b"\x80\x02\x82\x01.", b"Pname\n.", b"\x80\x02K\x01Q.", b"(cos\nsystem\no."):
        assert "could run code" in refusal(tmp_path / "labels.train", gzip.compress(code))
    assert not canary.exists()
    canary_works = pickle.dumps(attacks[3])
    pickle.loads(canary_works).close()  # noqa: S301
    assert canary.exists()


def test_what_only_wastes_memory_or_time_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.train"
    memo = b"\x80\x02}" + b"r" + struct.pack("<I", 0x0FFFFFFF) + b"."
    assert "memory that it does not need (memo 268435455)" in refusal(path, gzip.compress(memo))
    text_memo = b"(dp268435455\n."
    assert "memory that it does not need" in refusal(path, gzip.compress(text_memo))
    huge_string = b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x."
    assert "does not fit into memory" in refusal(path, gzip.compress(huge_string))
    digits = b"I" + b"9" * 1_000_000 + b"\n."
    assert "not a readable pickle" in refusal(path, gzip.compress(digits))
    nested = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns."  # a key whose hash would overflow the stack
    assert "its pickle holds EMPTY_TUPLE" in refusal(path, gzip.compress(nested))


BOMB = """
import sys
from pathlib import Path
from sltscale.data.annotations import labels
from sltscale.errors import InputError

labels.MAX_UNPACKED_BYTES = 200 << 20  # a tenth of it, to be quick
try:
    labels.read_labels(Path(sys.argv[1]))
except InputError as error:
    print(error)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def test_a_gzip_bomb_is_refused_without_taking_memory(tmp_path: Path) -> None:
    assert labels.MAX_UNPACKED_BYTES == 2 << 30
    path = tmp_path / "labels.train"
    path.write_bytes(gzip.compress(b"\x80\x02" + b"N" * (250 << 20), 1))
    assert path.stat().st_size < 3 << 20
    found = subprocess.run([sys.executable, "-c", BOMB, path], capture_output=True, text=True, check=True, timeout=600)
    message, kilobytes = found.stdout.splitlines()
    assert f"unpacks to more than {200 << 20} bytes" in message
    assert int(kilobytes) < 60_000


def test_files_that_are_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.train"
    whole = gzip.compress(pickle.dumps(CLIPS))
    assert "not a readable gzip file" in refusal(path, b"\x1f\x8b")
    assert "not a readable gzip file" in refusal(path, b"text")
    assert "not a readable gzip file" in refusal(path, whole[:-20])
    assert "not a readable gzip file" in refusal(path, whole[:40] + b"\xff" * 8 + whole[48:])
    assert "not a readable pickle" in refusal(path, gzip.compress(b""))
    assert "not a readable pickle" in refusal(path, gzip.compress(pickle.dumps(CLIPS)[:-30]))
    assert "not a readable pickle" in refusal(path, gzip.compress(b"\x80\x04u."))
    assert "not a readable pickle" in refusal(path, gzip.compress(b"\x80\x02}]Ns."))  # a list as key
    assert "could run code" in refusal(path, gzip.compress(pickle.dumps({"a": {"text": {1, 2}}})))
    assert "holds a list, expected a dict of clips" in refusal(path, gzip.compress(pickle.dumps([CLIPS])))
    assert "holds int -> dict" in refusal(path, gzip.compress(pickle.dumps({1: {}})))
    assert "holds str -> str" in refusal(path, gzip.compress(pickle.dumps({"a": "b"})))
    assert "holds no clips" in refusal(path, gzip.compress(pickle.dumps({})))
    with pytest.raises(InputError, match="No such file"):
        read_labels(tmp_path / "missing")
    assert not labels.is_labels(tmp_path / "missing")


def test_random_damage_never_ends_in_anything_but_a_refusal(tmp_path: Path) -> None:
    content = pickle.dumps(CLIPS, 4)
    path, generator = tmp_path / "labels.train", random.Random(0)  # noqa: S311
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(gzip.compress(bytes(damaged), 1))
        try:
            for label in read_labels(path).values():
                label_images(label)
        except (InputError, BadRow):
            refused += 1
    assert refused > 200


def test_images_lie_in_one_folder() -> None:
    good = {"text": "x", "imgs_path": ["train/a/1.png", "train/a/2.png"]}
    assert label_images(good) == ("train/a", ("1.png", "2.png"))
    assert label_images(good | {"imgs_path": ["1.png"]}) == ("", ("1.png",))
    for changes, reason in (
        ({"imgs_path": ["a/1.png", "b/2.png"]}, "its images lie in 2 folders"),
        ({"imgs_path": ["a/1.png", "a/"]}, "an image without a name"),
        ({"imgs_path": []}, "'imgs_path' is not a list of names"),
        ({"imgs_path": [None]}, "'imgs_path' is not a list of names"),
        ({"imgs_path": "a/1.png"}, "'imgs_path' is of type str"),
        ({"text": ["x"]}, "'text' is of type list"),
        ({"length": "2"}, "'length' is of type str"),
        ({"gloss": 5}, "'gloss' is of type int"),
    ):
        with pytest.raises(BadRow, match=reason):
            label_images(good | changes)
