"""Word vectors from a fastText model file (.bin), of words that it has never seen too, by their character n-grams.

The file is read where it lies (published ones have 7 GB); only the rows that the wanted words need are taken.
facebookresearch/fastText src/fasttext.cc (loadModel, getWordVector) and src/dictionary.cc (load, computeSubwords).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sltscale.errors import InputError

MAGIC, VERSION = 793712314, 12
_ARGUMENTS = struct.Struct("<12id")  # width is the first, number of buckets and n-gram lengths are 8, 9 and 10
_DICTIONARY = struct.Struct("<3i2q")  # entries, words, labels; tokens, pruned buckets (-1: none)
_ENTRY = struct.Struct("<qb")  # count, type (0: a word)
_MATRIX = struct.Struct("<?2q")  # quantised or not, rows, columns


def read_bin(path: Path, words: Sequence[str]) -> npt.NDArray[np.float32]:
    """float32 [K, width], as fastText's ``get_word_vector`` gives them; 0 for a word too short for any n-gram.

    InputError if it is no such file, a quantised one, or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _vectors(path, content, words)
    except (OSError, ValueError, struct.error, OverflowError) as error:
        raise InputError(f"{path}: not a readable fastText model ({str(error).splitlines()[0]})") from None


def _vectors(path: Path, content: mmap.mmap, words: Sequence[str]) -> npt.NDArray[np.float32]:
    magic, version = struct.unpack_from("<2i", content, 0)
    if (magic, version) != (MAGIC, VERSION):
        raise InputError(f"{path}: begins with {magic}, {version}; expected a fastText model of version {VERSION}")
    offset = 8
    width, *others = _ARGUMENTS.unpack_from(content, offset)
    buckets, shortest, longest = others[7:10]
    offset += _ARGUMENTS.size
    entries, known, _, _, pruned = _DICTIONARY.unpack_from(content, offset)
    offset += _DICTIONARY.size
    if pruned >= 0:
        raise InputError(f"{path}: a quantised fastText model (.ftz); expected a whole one (.bin)")
    wanted = {word.encode() for word in words}
    numbers: dict[bytes, int] = {}
    for number in range(entries):
        end = content.find(b"\0", offset)
        if end < 0:
            raise ValueError("its dictionary is cut short")
        if (word := content[offset:end]) in wanted and number < known:
            numbers[word] = number
        offset = end + 1 + _ENTRY.size
    quantised, rows, columns = _MATRIX.unpack_from(content, offset)
    offset += _MATRIX.size
    if quantised or columns != width or rows != known + buckets:
        raise ValueError(f"its matrix is {rows} x {columns}, expected {known + buckets} x {width}, not quantised")
    if len(content) < offset + 4 * rows * columns:
        raise ValueError("its matrix is cut short")
    vectors = np.zeros((len(words), width), dtype=np.float32)
    for place, text in enumerate(words):
        word = text.encode()
        needed = [known + bucket for bucket in ngram_buckets(word, buckets, shortest, longest)]
        if word in numbers:
            needed.insert(0, numbers[word])
        if needed:
            own = [np.frombuffer(content, "<f4", width, offset + 4 * width * row).copy() for row in needed]
            vectors[place] = np.mean(own, axis=0)
    return vectors


def ngram_buckets(word: bytes, buckets: int, shortest: int, longest: int) -> list[int]:
    """The buckets of the n-grams (by UTF-8 characters) of <word>; its first and last mark alone are none."""
    if not buckets:
        return []
    marked = f"<{word.decode()}>"
    found = []
    for start in range(len(marked)):
        for length in range(shortest, min(longest, len(marked) - start) + 1):
            if length == 1 and start in (0, len(marked) - 1):
                continue
            found.append(_fnv1a(marked[start : start + length].encode()) % buckets)
    return found


def _fnv1a(text: bytes) -> int:
    """32 bits; as in fastText, bytes from 128 on are taken to be negative."""
    value = 2166136261
    for byte in text:
        value ^= byte if byte < 128 else byte | 0xFFFFFF00
        value = value * 16777619 & 0xFFFFFFFF
    return value
