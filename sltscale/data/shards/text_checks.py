"""What is suspicious about the texts of a corpus: the same text again, and characters of another script.

Everything is linear in the number of texts: each text is compared by a 64-bit hash of its form (two different ones
among a million share a hash with a probability of 3e-8).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

EXAMPLES = 5
LISTED = 50  # characters of other scripts
# Scripts by the first word of a character's Unicode name, for the primary subtags of BCP-47 languages.
_LATIN = ("LATIN",)
_HAN = ("CJK", "IDEOGRAPHIC")
SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cs", "da", "de", "en", "es", "et", "fi", "fr", "hu", "id", "it", "lt", "lv", "nl"), _LATIN),
    **dict.fromkeys(("no", "pl", "pt", "ro", "sk", "sl", "sv", "tr", "vi"), _LATIN),
    **dict.fromkeys(("bg", "kk", "ru", "uk"), ("CYRILLIC",)),
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "gu": ("GUJARATI",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": (*_HAN, "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": (*_HAN, "HANGUL"),
    "my": ("MYANMAR",),
    "ne": ("DEVANAGARI",),
    "si": ("SINHALA",),
    "zh": _HAN,
}
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")


class _Without(dict[int, int | str | None]):
    """For str.translate: characters of these Unicode categories (by first letter) become ``instead``."""

    def __init__(self, categories: str, instead: str | None) -> None:
        super().__init__()
        self.categories, self.instead = categories, instead

    def __missing__(self, code: int) -> int | str | None:
        out = unicodedata.category(chr(code))[0] in self.categories
        self[code] = self.instead if out else code
        return self[code]


_NO_PUNCTUATION = _Without("PZC", None)
_SPACED = _Without("PZC", " ")


def normalised(text: str) -> str:
    """NFKC, case folded, without punctuation, white space and control characters."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_NO_PUNCTUATION)


def words(text: str) -> str:
    """The different words of the normalised text in alphabetical order; of Chinese and kana, characters."""
    spaced = unicodedata.normalize("NFKC", text).casefold().translate(_SPACED)
    return " ".join(sorted(set(_WORDS.findall(spaced))))


FORMS: dict[str, Callable[[str], str]] = {"exact": str, "normalised": normalised, "same_words": words}


def duplicates(texts: Mapping[str, Sequence[str]], id_of: Callable[[str, int], str]) -> dict[str, Any]:
    """Texts that occur more than once, by each of FORMS: within a split, and across each pair of splits.

    texts: of every split. id_of: (split, clip) to id, for the examples. within: clips whose text an earlier one has;
    across: different texts in both splits and the clips that have them, in the first and in the second split.
    """
    found: dict[str, Any] = {}
    for rule, form in FORMS.items():
        hashes = {split: _hashes(map(form, lines)) for split, lines in texts.items()}
        unique = {split: np.unique(column, return_index=True, return_counts=True) for split, column in hashes.items()}
        across = {}
        for first, second in combinations(texts, 2):
            common = np.intersect1d(unique[first][0], unique[second][0], assume_unique=True)
            clips = {split: np.flatnonzero(np.isin(hashes[split], common)) for split in (first, second)}
            across[f"{first} and {second}"] = {
                "texts": len(common),
                "clips": {split: len(numbers) for split, numbers in clips.items()},
                "examples": [
                    {
                        "text": texts[second][clip],
                        "ids": [id_of(first, _where(hashes[first], hashes[second][clip])), id_of(second, clip)],
                    }
                    for clip in clips[second][:EXAMPLES].tolist()
                ],
            }
        within = {split: len(hashes[split]) - len(values) for split, (values, _, _) in unique.items()}
        found[rule] = {"within": within, "across": across, "most_frequent": _most_frequent(texts, unique)}
    return found


def foreign_characters(
    texts: Sequence[str], numbers: Sequence[int], language: str, id_of: Callable[[int], str]
) -> dict[str, Any]:
    """Letters of another script than that of ``language``, and control, private and unassigned characters.

    numbers: of the texts to look at. different: how many such characters there are; the most frequent with their
    counts and the id of the first clip that has them. If SCRIPTS does not know the language, ``expected`` is empty and
    letters are not judged.
    """
    expected = SCRIPTS.get(language.replace("_", "-").split("-")[0].lower(), ())
    counts = _count_characters(texts, numbers)
    foreign = {chr(code): int(counts[code]) for code in np.flatnonzero(counts) if _foreign(chr(code), expected)}
    listed = sorted(foreign, key=lambda character: (-foreign[character], character))[:LISTED]
    first: dict[str, int] = {}
    if listed:
        pattern = re.compile(f"[{re.escape(''.join(listed))}]")
        for number in numbers:
            for character in pattern.findall(texts[number]):
                first.setdefault(character, number)
    return {
        "expected": list(expected),
        "different": len(foreign),
        "characters": [
            {"character": one, "name": _name(one), "count": foreign[one], "first": id_of(first[one])} for one in listed
        ],
    }


def _hashes(lines: Iterable[str]) -> np.ndarray:
    digests = (hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).digest() for line in lines)
    return np.frombuffer(b"".join(digests), np.uint64)


def _where(hashes: np.ndarray, value: np.uint64) -> int:
    return int(np.argmax(hashes == value))


def _most_frequent(
    texts: Mapping[str, Sequence[str]], unique: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> list[dict[str, Any]]:
    """The texts that most clips of one split have, as they stand in the first of them."""
    repeated = [
        {"split": split, "clips": int(counts[at]), "text": texts[split][first[at]]}
        for split, (_, first, counts) in unique.items()
        for at in np.lexsort((first, -counts))[:EXAMPLES]
        if counts[at] > 1
    ]
    return sorted(repeated, key=lambda row: -row["clips"])[:EXAMPLES]


def _count_characters(texts: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    counts = np.zeros(0x110000, np.int64)
    for begin in range(0, len(numbers), 10_000):
        block = "".join(texts[number] for number in numbers[begin : begin + 10_000])
        codes = np.frombuffer(block.encode("utf-32-le"), np.uint32)
        counts += np.bincount(codes, minlength=len(counts))
    return counts


def _foreign(character: str, expected: tuple[str, ...]) -> bool:
    category = unicodedata.category(character)
    if category[0] == "C" or character == "\ufffd":
        return True
    if category[0] != "L" or not expected:
        return False
    # Full-width and other compatibility forms belong to the script of what they stand for.
    plain = unicodedata.normalize("NFKC", character)[0]
    script = _name(plain).split(" ")[0]
    return script != "MODIFIER" and script not in expected


def _name(character: str) -> str:
    return unicodedata.name(character, f"U+{ord(character):04X}")
