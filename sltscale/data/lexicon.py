"""A lexicon of pseudo-glosses: which there are, which of them each training sentence holds, and a vector for each.

FOLDER/glosses.txt         one a line, sorted: the order of the model's prototypes
       sentences.jsonl     {"text": ..., "glosses": [...]}, each distinct sentence once
       vectors.safetensors float32 [K, D]
       lexicon.json        how it was made
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from sltscale.errors import InputError

Analyse = Callable[[Sequence[str]], Iterable[list[str]]]
"""Sentences to the pseudo-glosses of each, in order."""


@dataclass(frozen=True)
class Lexicon:
    """glosses: sorted. of_sentence: sentence -> the numbers of its pseudo-glosses, ascending. vectors: float32 [K, D].
    origin: how it was made, for the record."""

    glosses: tuple[str, ...]
    of_sentence: dict[str, tuple[int, ...]]
    vectors: npt.NDArray[np.float32]
    origin: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.glosses)

    def targets(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, K], 1 where the sentence holds the pseudo-gloss; all 0 for one that the lexicon does not know."""
        targets = torch.zeros(len(texts), len(self))
        for row, text in enumerate(texts):
            targets[row, list(self.of_sentence.get(text, ()))] = 1
        return targets

    def check_covers(self, texts: Sequence[str], name: str) -> None:
        """InputError if there are training sentences that it was not built from: they would be taken to be empty."""
        known = sum(text in self.of_sentence for text in texts)
        if known < len(texts):
            raise InputError(
                f"lexicon {name} knows {known} of {len(texts)} training sentences; build it from all the shards of the "
                "run: sltscale lexicon build"
            )

    def save(self, target: Path | str) -> None:
        """Write the folder, whole or not at all; one that is there is replaced."""
        folder = Path(target).with_name(f".{Path(target).name}.staging")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "glosses.txt").write_text("".join(f"{gloss}\n" for gloss in self.glosses), encoding="utf-8")
        lines = [
            json.dumps({"text": text, "glosses": [self.glosses[number] for number in numbers]}, ensure_ascii=False)
            for text, numbers in self.of_sentence.items()
        ]
        (folder / "sentences.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (folder / "lexicon.json").write_text(json.dumps(self.origin, indent=2, ensure_ascii=False) + "\n")
        save_file({"vectors": np.ascontiguousarray(self.vectors)}, folder / "vectors.safetensors")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


def build_lexicon(
    sentences: Iterable[str],
    analyse: Analyse,
    vectors: Callable[[Sequence[str], Sequence[list[str]]], npt.NDArray[np.float32]],
    *,
    max_share: float = 1.0,
    origin: dict[str, Any] | None = None,
) -> Lexicon:
    """The lexicon of the training sentences, the same for the same sentences in any order.

    vectors: (pseudo-glosses, those of each sentence) -> [K, D]. max_share: a pseudo-gloss in more than this share of
    the distinct sentences says nothing and is left out (Sign2GPT 0.4; HFA keeps all). InputError if none is left.
    """
    texts = sorted({sentence for sentence in sentences if sentence.strip()})
    found = [sorted(set(glosses)) for glosses in analyse(texts)]
    counts: dict[str, int] = {}
    for glosses in found:
        for gloss in glosses:
            counts[gloss] = counts.get(gloss, 0) + 1
    kept = tuple(sorted(gloss for gloss, count in counts.items() if count <= max_share * len(texts)))
    if not kept:
        raise InputError(f"no pseudo-gloss was found in {len(texts)} sentences; expected training texts with words")
    number = {gloss: place for place, gloss in enumerate(kept)}
    found = [[gloss for gloss in glosses if gloss in number] for glosses in found]
    of_sentence = {text: tuple(number[gloss] for gloss in glosses) for text, glosses in zip(texts, found, strict=True)}
    return Lexicon(kept, of_sentence, vectors(kept, found), origin or {})


def load_lexicon(folder: Path | str) -> Lexicon:
    """A saved lexicon; InputError, naming the file, if there is none or its parts do not fit together."""
    folder = Path(folder)
    try:
        glosses = tuple((folder / "glosses.txt").read_text(encoding="utf-8").splitlines())
        lines = (folder / "sentences.jsonl").read_text(encoding="utf-8").splitlines()
        origin = json.loads((folder / "lexicon.json").read_text(encoding="utf-8"))
        vectors = load_file(folder / "vectors.safetensors")["vectors"]
        number = {gloss: place for place, gloss in enumerate(glosses)}
        of_sentence = {}
        for line in lines:
            row = json.loads(line)
            of_sentence[row["text"]] = tuple(sorted(number[gloss] for gloss in row["glosses"]))
    except FileNotFoundError as error:
        name = Path(error.filename or "").name
        raise InputError(f"{folder} holds no {name}; expected a folder made by sltscale lexicon build") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"lexicon {folder} cannot be read ({error!r}); build it again") from None
    if list(glosses) != sorted(number) or not glosses:
        raise InputError(f"{folder / 'glosses.txt'}: expected pseudo-glosses in ascending order, each once")
    if vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != len(glosses):
        raise InputError(
            f"{folder / 'vectors.safetensors'}: holds {vectors.dtype} {list(vectors.shape)}, expected float32 "
            f"[{len(glosses)}, width] as there are {len(glosses)} pseudo-glosses"
        )
    return Lexicon(glosses, of_sentence, vectors, origin)
