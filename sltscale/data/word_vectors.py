"""A vector for each word: published fastText vectors, or vectors learnt from the corpus's own sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sltscale.data.fasttext_model import read_bin
from sltscale.errors import InputError

Vectors = npt.NDArray[np.float32]


def corpus_vectors(words: Sequence[str], sentences: Sequence[list[str]], width: int) -> Vectors:
    """float32 [K, width]: words that share sentences lie close together.

    Truncated SVD of positive pointwise mutual information of pairs within a sentence (Levy and Goldberg 2014), singular
    values to the power 1/2, each row of length 1. With fewer words than ``width`` the other columns are 0, and a word
    that shares no sentence has a place of its own. The same bytes for the same sentences on one machine.
    """
    number = {word: place for place, word in enumerate(words)}
    pairs = np.zeros((len(words), len(words)))
    for sentence in sentences:
        places = sorted({number[word] for word in sentence})
        pairs[np.ix_(places, places)] += 1
    alone = np.diag(pairs).copy()
    np.fill_diagonal(pairs, 0)
    expected = np.outer(alone, alone) / max(len(sentences), 1)
    with np.errstate(divide="ignore"):
        information = np.log(pairs / expected)
    # A word goes with itself as closely as with its best neighbour, so that neighbours' rows come to lie near its own.
    positive = np.maximum(information, 0)
    np.fill_diagonal(positive, np.maximum(positive.max(1, initial=0), 1e-3))
    left, singular, _ = np.linalg.svd(positive, hermitian=True)
    rank = min(width, len(words))
    vectors = np.zeros((len(words), width))
    vectors[:, :rank] = left[:, :rank] * np.sqrt(singular[:rank])
    # The sign of a singular vector is arbitrary: its largest entry is made positive.
    largest = np.abs(vectors).argmax(0)
    vectors *= np.where(vectors[largest, np.arange(width)] < 0, -1, 1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return _filled((vectors / np.maximum(lengths, 1e-12)).astype(np.float32))


def published_vectors(path: Path, words: Sequence[str]) -> tuple[Vectors, list[str]]:
    """(float32 [K, D], words that the file has nothing for) from a fastText .vec or .bin file.

    A .bin knows every word by its character n-grams. Words that it has nothing for point in random directions, the same
    every time. InputError if it is neither, cannot be read, or has none of the words.
    """
    if path.suffix not in (".vec", ".bin"):
        raise InputError(f"{path}: expected fastText vectors, .vec or .bin")
    vectors = read_bin(path, words) if path.suffix == ".bin" else read_vec(path, words)
    missing = [word for word, vector in zip(words, vectors, strict=True) if not vector.any()]
    if len(missing) == len(words):
        raise InputError(f"{path}: has none of the {len(words)} pseudo-glosses; is it of another language?")
    return _filled(vectors), missing


def _filled(vectors: Vectors) -> Vectors:
    """Random directions for rows of 0, which cosines could not be taken of, as long as the others are on average."""
    empty = np.logical_not(np.any(vectors, axis=1))
    length = np.linalg.norm(vectors[~empty], axis=1).mean() if not empty.all() else 1.0
    directions = np.random.default_rng(0).normal(size=vectors.shape)
    directions *= length / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.where(empty[:, None], directions, vectors).astype(np.float32)


def read_vec(path: Path, words: Sequence[str]) -> Vectors:
    """float32 [K, D] from a fastText .vec file; 0 for words that it does not hold.

    A header "number width", then a word and its numbers a line. Only the wanted words' numbers are kept. InputError
    naming file and line if it is another format.
    """
    number = {word: place for place, word in enumerate(words)}
    found: set[str] = set()
    try:
        with path.open(encoding="utf-8", errors="strict", newline="\n") as file:
            header = file.readline().split()
            if len(header) != 2 or not all(part.isdigit() for part in header):
                raise InputError(f"{path}:1: found {' '.join(header)[:40]!r}, expected a .vec header: words and width")
            dimension = int(header[1])
            if not 0 < dimension <= 4096:
                raise InputError(f"{path}: vectors of width {dimension}, expected at most 4096")
            vectors = np.zeros((len(words), dimension), dtype=np.float32)
            for line_number, line in enumerate(file, 2):
                word, _, numbers = line.rstrip(" \n").partition(" ")
                if word in number and word not in found:
                    row = np.array(numbers.split(" "), dtype=np.float32)
                    if row.shape != (dimension,) or not np.isfinite(row).all():
                        raise InputError(f"{path}:{line_number}: expected {dimension} finite numbers, found {len(row)}")
                    vectors[number[word]] = row
                    found.add(word)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable .vec file ({str(error).splitlines()[0]})") from None
    return vectors
