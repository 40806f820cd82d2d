"""What an untrusted tar holds, from its headers alone: nothing is extracted, decoded, or kept per member.

sltscale reads clips by offset and never asks a tar for its members. Other readers do, and some run code out of them
(webdataset's bare ``decode`` unpickles) or write where a name says; so ``sltscale shards verify`` counts what does not
belong into a shard. The walk follows POSIX.1-2001 (pax) and GNU tar as Python's tarfile reads them, in constant memory.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sltscale.data.shards.index import BLOCK, FEATURE_MEMBERS, MEMBERS, padded

LONGEST_HEADER = 1 << 20
CLIP_SUFFIXES = (f".{MEMBERS[1]}", f".{FEATURE_MEMBERS[1]}")
# Formats whose usual loaders run code that the file holds, or that webdataset decodes by its name alone.
EXECUTABLE = frozenset(
    {"pkl", "pickle", "dill", "joblib", "pyd", "pth", "pt", "ckpt", "npy", "npz", "cls", "mp", "msg", "cbor", "ten"}
    | {"tb", "py", "pyc", "so", "dll", "dylib", "exe", "com", "bat", "cmd", "ps1", "sh", "jar", "js"}
)

_KEY = re.compile(r"[A-Za-z0-9_-]{1,200}\Z")
_RECORD = re.compile(rb"([0-9]{1,9}) ([^=]*)=")
_REGULAR, _LONG_NAME, _LONG_LINK, _PAX = b"0", b"L", b"K", b"x"
_NO_CONTENT = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe"}
_END = bytes(BLOCK)


@dataclass(frozen=True)
class TarScan:
    """clips: well-named mp4 or safetensors members. foreign: counts of all that is not a clip's json, one of these, or
    txt, by reason."""

    clips: int
    foreign: dict[str, int]

    def __str__(self) -> str:
        count = sum(self.foreign.values())
        reasons = ", ".join(f"{number} x {reason}" for reason, number in self.foreign.items())
        return f"{count or 'no'} foreign members" + (f": {reasons}" if count else "")


def scan(path: Path) -> TarScan:
    """Count the members of a tar, up to its end mark or the first block that is no header (which counts as foreign).

    Reasons are our own words and never hold a member's name. OSError if the file cannot be read.
    """
    clips, foreign = 0, Counter[str]()
    with path.open("rb", buffering=1 << 18) as file:
        total = os.fstat(file.fileno()).st_size
        name, size = "", -1  # from an extended header, for the member behind it
        while (header := file.read(BLOCK)) != _END and (header or not total):
            length = _number(header[124:136])
            if len(header) < BLOCK or length < 0 or not _checksum_holds(header):
                foreign["not a tar header (what follows it is not read)"] += 1
                break
            kind = header[156:157].replace(b"\0", _REGULAR)
            extended = kind in (_LONG_NAME, _LONG_LINK, _PAX)
            if not extended and size >= 0:
                length = size
            # Links, devices and folders have no content, whatever their size says.
            end = file.tell() + (0 if kind in _NO_CONTENT else padded(length))
            if extended and length > LONGEST_HEADER:
                foreign["an extended header over 1 MiB"] += 1
            elif extended:
                name, size = _extended(kind, file.read(length), name, size)
            else:
                name = name or _name(header)
                if reason := _reason(kind, name):
                    foreign[reason] += 1
                else:
                    clips += name.endswith(CLIP_SUFFIXES)
                name, size = "", -1
            if end > total:
                foreign["a member that the end of the file cuts off"] += 1
                break
            file.seek(end - file.tell(), os.SEEK_CUR)  # stays in the buffer where it can
    return TarScan(clips, dict(foreign.most_common()))


def _reason(kind: bytes, name: str) -> str:
    """Why a member is foreign; empty if it is not."""
    if kind != _REGULAR:
        return _NO_CONTENT.get(kind, "a special member")
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        return "a path for a name"
    key, *extensions = name.split(".")
    executable = [extension for extension in map(str.lower, extensions) if extension in EXECUTABLE]
    if executable:
        return f".{executable[-1]}, which loading may execute"
    if len(extensions) != 1 or extensions[0] not in (*MEMBERS, *FEATURE_MEMBERS):
        return "another extension than " + ", ".join(dict.fromkeys((*MEMBERS, *FEATURE_MEMBERS)))
    return "" if _KEY.match(key) else "a key that is not of 1-200 letters, digits, _ and -"


def _extended(kind: bytes, content: bytes, name: str, size: int) -> tuple[str, int]:
    """Name and size that an extended header gives to the next member, in place of these."""
    if kind == _LONG_NAME:
        return content.partition(b"\0")[0].decode("utf-8", "replace"), size
    begin = 0
    while kind == _PAX and (record := _RECORD.match(content, begin)) and int(record[1]) > record.end() - begin:
        value = content[record.end() : begin + int(record[1]) - 1]
        if record[2] == b"path":
            name = value.decode("utf-8", "replace")
        elif record[2] == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        begin += int(record[1])
    return name, size


def _name(header: bytes) -> str:
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    ustar = header[257:263] == b"ustar\0"
    return (prefix + b"/" + name if ustar and prefix else name).decode("utf-8", "replace")


def _number(field: bytes) -> int:
    """A number field, octal or GNU's base 256; -1 if it is neither or negative."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1


def _checksum_holds(header: bytes) -> bool:
    return _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
