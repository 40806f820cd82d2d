"""Scores of translations: BLEU-1..4 and chrF (sacrebleu's only door), ROUGE-L, and the same with shuffled references.

Two conventions, because published numbers of the field follow either (docs/evaluation.md):

``13a``  sacrebleu's defaults: 13a tokens (its ``zh`` tokens for Chinese), exponential smoothing. The ``sacrebleu``
         command on the same sentences gives the same numbers.
``slt``  the habit of sign language translation since Camgoz et al. 2018: sentences are split at white space only
         (Chinese: into characters), smoothing "floor" with value 0, effective order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from sltscale.errors import InputError

Convention = Literal["slt", "13a"]

ROUGE_BETA = 1.2
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates


def score(
    hypotheses: Sequence[str], references: Sequence[str], *, language: str, convention: Convention = "slt"
) -> dict[str, Any]:
    """Corpus scores of one hypothesis and one reference per clip.

    language: BCP-47; "zh" is scored by characters. Every text is first brought to one line (``one_line``).

    Returns ``bleu1`` .. ``bleu4`` (cumulative, each with its own maximum order), ``chrf`` and ``rouge_l``, all 0-100;
    ``length_ratio`` (tokens of the hypotheses / tokens of the references, as BLEU counts them), ``empty_hypotheses``,
    ``sentences``, and ``signature``: sacrebleu's own strings for "bleu" and "chrf", the settings of "rouge_l", and the
    convention with the level (word or character) that texts were split to before they reached sacrebleu.

    Raises InputError if there is nothing to score or the two numbers of sentences differ.
    """
    if not references or len(hypotheses) != len(references):
        raise InputError(
            f"{len(hypotheses)} hypotheses and {len(references)} references; expected the same number, at least one"
        )
    hypotheses = [one_line(text) for text in hypotheses]
    references = [one_line(text) for text in references]
    by_character = _is_chinese(language)
    bleu_texts = (hypotheses, references)
    if by_character and convention == "slt":
        bleu_texts = ([" ".join(text) for text in hypotheses], [" ".join(text) for text in references])

    scores: dict[str, Any] = {}
    for order in (1, 2, 3, 4):
        bleu = _bleu(order, convention, by_character)
        result = bleu.corpus_score(bleu_texts[0], [bleu_texts[1]])
        scores[f"bleu{order}"] = float(result.score)
    chrf = CHRF()
    scores["chrf"] = float(chrf.corpus_score(hypotheses, [references]).score)
    scores["rouge_l"] = rouge_l(hypotheses, references, by_character=by_character)
    scores["length_ratio"] = float(result.ratio)
    scores["empty_hypotheses"] = sum(not text for text in hypotheses)
    scores["sentences"] = len(references)
    level = "character" if by_character else "word"
    scores["signature"] = {
        "bleu": str(bleu.get_signature()),
        "chrf": str(chrf.get_signature()),
        "rouge_l": f"beta:{ROUGE_BETA}|tok:{level}|mean:sentences",
        "convention": f"{convention}|level:{level}",
    }
    return scores


def score_shuffled(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    language: str,
    convention: Convention = "slt",
    seed: int = 0,
) -> float:
    """BLEU-4 (0-100) of every hypothesis against the reference of *another* clip.

    What is left is what fluent text of the corpus gets without looking at the video; a model whose true score is no
    better reads the grammar and not the signing. Needs two clips or more.
    """
    others = derangement(len(references), seed)
    shuffled = [references[i] for i in others]
    return float(score(hypotheses, shuffled, language=language, convention=convention)["bleu4"])


def derangement(n: int, seed: int) -> list[int]:
    """A permutation of 0..n-1 without a fixed point, uniform among all of them and fixed by ``seed``; n >= 2."""
    if n < 2:
        raise InputError(f"{n} clip to shuffle; expected at least two, so that each can get another's reference")
    generator = np.random.default_rng(seed)
    identity = np.arange(n)
    while True:  # 1/e of all permutations qualify, so 2.7 draws on average
        permutation = generator.permutation(n)
        if not (permutation == identity).any():
            return [int(i) for i in permutation]


def rouge_l(hypotheses: Sequence[str], references: Sequence[str], *, by_character: bool = False) -> float:
    """ROUGE-L as the field computes it: F with beta 1.2, mean over the sentences, 0-100.

    F = (1 + beta^2) P R / (R + beta^2 P) with P = LCS / hypothesis tokens, R = LCS / reference tokens (the caption
    evaluation's ROUGE-L, not the F1 of rouge_score). Tokens are split at white space, or single characters.
    """
    total = 0.0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = (
            list("".join(text.split())) if by_character else text.split() for text in (hypothesis, reference)
        )
        common = _longest_common_subsequence(ours, theirs)
        if common:
            precision, recall = common / len(ours), common / len(theirs)
            total += (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return 100 * total / len(references)


def one_line(text: str) -> str:
    """``text`` without characters that no text file holds and with single spaces between words.

    The scores are those of the texts in this form, so that a file with one sentence per line gives the same ones.
    """
    return " ".join(_UNWRITABLE.sub(" ", text).split())


def _bleu(order: int, convention: Convention, by_character: bool) -> Any:
    # force only silences a warning about text that looks tokenised; it changes no score and no signature
    if convention == "13a":
        return BLEU(max_ngram_order=order, tokenize="zh" if by_character else "13a", force=True)
    if convention == "slt":
        return BLEU(
            max_ngram_order=order,
            tokenize="none",
            smooth_method="floor",
            smooth_value=0,
            effective_order=True,
            force=True,
        )
    raise InputError(f"unknown scoring convention {convention!r}; valid: slt, 13a")


def _is_chinese(language: str) -> bool:
    return re.split("[-_]", language)[0].lower() == "zh"


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    lengths = [0] * (len(b) + 1)  # of the common subsequence of a[:i] and b[:j]
    for token in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if token == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]
