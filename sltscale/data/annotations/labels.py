"""Labels as many groups share them: a gzip-compressed pickle of one dict a clip. Read without executing anything.

A pickle is a program for a small machine. Before it runs, every instruction is compared with the few that strings,
numbers, lists and dicts need; those that import, call, or only waste memory (a memo slot 2^31, nested tuples as keys)
end the reading. The unpickler refuses every name besides.
"""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import sys
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from sltscale.data.annotations.tables import BadRow, check_file
from sltscale.errors import InputError

GZIP = b"\x1f\x8b"
MAX_UNPACKED_BYTES = 2 << 30
_BUFFER = 1 << 20

_FRAMING = {"PROTO", "FRAME", "MARK", "STOP", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"}
_CONTAINERS = {"EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"}
_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT", "NEWTRUE", "NEWFALSE", "NONE"}
_ADMITTED = _FRAMING | _CONTAINERS | _STRINGS | _NUMBERS

_FIELDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "imgs_path": (list,),
    "length": (int,),
    "name": (str,),
    "gloss": (str, list),
    "signer": (str,),
}


def is_labels(path: Path) -> bool:
    """Whether this is a regular file that begins as gzip files do; False also if it cannot be opened."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(GZIP)) == GZIP
    except OSError:
        return False


def read_labels(path: Path) -> dict[str, dict[str, Any]]:
    """Clips by key, in the file's order; values hold strings, numbers, None, lists and dicts only.

    InputError if the file cannot be read, has more than MAX_BYTES (MAX_UNPACKED_BYTES unpacked), holds anything else,
    or is not a dict of dicts by string.
    """
    _check_size(path)
    try:
        # In streams, so that what is refused has taken no memory.
        with gzip.open(path) as unpacked, io.BufferedReader(unpacked, _BUFFER) as file:
            _check_instructions(path, file)
        with gzip.open(path) as unpacked, io.BufferedReader(unpacked, _BUFFER) as file:
            labels = _Unpickler(file).load()
    # A damaged pickle can fail in any of these ways; none of them runs code.
    except (pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable pickle ({_one_line(error)}); download it again") from None
    except (MemoryError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: a pickle that does not fit into memory ({type(error).__name__})") from None
    if not isinstance(labels, dict):
        raise InputError(f"{path}: holds a {type(labels).__name__}, expected a dict of clips")
    for key, label in labels.items():
        if not (isinstance(key, str) and isinstance(label, dict)):
            found = f"{type(key).__name__} -> {type(label).__name__}"
            raise InputError(f"{path}: holds {found}, expected clips as key (str) -> fields (dict)")
    if not labels:
        raise InputError(f"{path}: holds no clips; expected a dict of them")
    return labels


def label_images(label: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The folder that a label's images lie in, and their names there; BadRow if the label is not as it should be."""
    for name, types in _FIELDS.items():
        if name not in label and name in ("text", "imgs_path"):
            raise BadRow(f"{name!r} is missing")
        if name in label and not isinstance(label[name], types):
            raise BadRow(f"{name!r} is of type {type(label[name]).__name__}")
    paths = label["imgs_path"]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise BadRow("'imgs_path' is not a list of names")
    folders, names = zip(*(path.rpartition("/")[::2] for path in paths), strict=True)
    if len(set(folders)) > 1:
        raise BadRow(f"its images lie in {len(set(folders))} folders, expected one")
    if not all(names):
        raise BadRow("an image without a name")
    return folders[0], tuple(map(sys.intern, names))


def _check_size(path: Path) -> None:
    unpacked = 0
    try:
        check_file(path)
        with gzip.open(path) as file:
            while piece := file.read(_BUFFER):
                unpacked += len(piece)
                if unpacked > MAX_UNPACKED_BYTES:
                    raise InputError(f"{path}: unpacks to more than {MAX_UNPACKED_BYTES} bytes; that is no label file")
    except BadRow as error:
        raise InputError(f"annotation file {path}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise InputError(f"{path}: not a readable gzip file ({reason}); download it again") from None


def _check_instructions(path: Path, content: BinaryIO) -> None:
    for count, (instruction, argument, _) in enumerate(pickletools.genops(content), start=1):
        name = instruction.name
        if name not in _ADMITTED:
            raise InputError(
                f"{path}: its pickle holds {name} ({_one_line(argument)}); only strings, numbers, lists and dicts are "
                "admitted, anything else could run code"
            )
        if name in ("PUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise InputError(f"{path}: its pickle asks for memory that it does not need (memo {argument})")


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:80]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")
