"""Scores of translations: BLEU-1..4 and chrF (sacrebleu's only door), ROUGE-L, the same with shuffled references, and
whether two systems differ.

Two conventions, because published numbers of the field follow either (docs/evaluation.md):

``13a``  sacrebleu's defaults: 13a tokens (its ``zh`` tokens for Chinese), exponential smoothing. The ``sacrebleu``
         command on the same sentences gives the same numbers.
``slt``  the habit of sign language translation since Camgoz et al. 2018: sentences are split at white space only
         (Chinese: into characters), smoothing "floor" with value 0, effective order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from sltscale.errors import InputError

Convention = Literal["slt", "13a"]

ROUGE_BETA = 1.2
_Beta = Callable[[float, float], float]  # of precision and recall
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates


def score(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    language: str,
    convention: Convention = "slt",
    append_period: bool = False,
) -> dict[str, Any]:
    """Corpus scores of one hypothesis and one reference per clip.

    language: BCP-47; "zh" is scored by characters. append_period: " ." behind every hypothesis and reference, as HFA's
    code has it, which lifts BLEU-1 by points. Every text is first brought to one line (``one_line``).

    Returns ``bleu1`` .. ``bleu4`` (cumulative, each with its own maximum order), ``chrf``, ``rouge_l`` and
    ``rouge_l_slrt``, all 0-100; ``length_ratio`` (tokens of the hypotheses / tokens of the references, as BLEU counts
    them), ``empty_hypotheses``, ``sentences``, and ``signature``: sacrebleu's own strings for "bleu" and "chrf", the
    settings of "rouge_l" and "rouge_l_slrt", and the convention with the level (word or character) that texts were
    split to before they reached sacrebleu.

    Raises InputError if there is nothing to score or the two numbers of sentences differ.
    """
    texts = _Texts.of(hypotheses, references, language=language, convention=convention, append_period=append_period)
    scores: dict[str, Any] = {}
    for order in (1, 2, 3, 4):
        bleu = _bleu(order, convention, texts.by_character)
        result = bleu.corpus_score(texts.split(texts.hypotheses), [texts.split(texts.references)])
        scores[f"bleu{order}"] = float(result.score)
    chrf = CHRF()
    scores["chrf"] = float(chrf.corpus_score(texts.hypotheses, [texts.references]).score)
    scores["rouge_l"] = rouge_l(texts.hypotheses, texts.references, by_character=texts.by_character)
    scores["rouge_l_slrt"] = rouge_l_slrt(texts.hypotheses, texts.references, by_character=texts.by_character)
    scores["length_ratio"] = float(result.ratio)
    scores["empty_hypotheses"] = sum(not one_line(text) for text in hypotheses)
    scores["sentences"] = len(references)
    level = "character" if texts.by_character else "word"
    scores["signature"] = {
        "bleu": str(bleu.get_signature()),
        "chrf": str(chrf.get_signature()),
        "rouge_l": f"beta:{ROUGE_BETA}|tok:{level}|mean:sentences",
        "rouge_l_slrt": f"beta:precision/recall|tok:{level}|mean:sentences",
        "convention": f"{convention}|level:{level}" + ("|period:appended" if append_period else ""),
    }
    return scores


@dataclass(frozen=True)
class Compared:
    """One score of two systems on the same references, 0-100. interval: half the width of the 95 % confidence interval,
    from bootstrap resamples of the sentences. p: how likely a difference as large as theirs is by chance; 1 if they are
    equal (where sacrebleu would say 1 / (samples + 1) of a system compared with itself)."""

    first: float
    first_interval: float
    second: float
    second_interval: float
    p: float


def compare(
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str],
    *,
    language: str,
    convention: Convention = "slt",
    append_period: bool = False,
    samples: int = 1000,
) -> dict[str, Compared]:
    """``bleu4``, ``chrf`` and ``rouge_l`` of two systems' hypotheses, by paired bootstrap (Koehn 2004; sacrebleu's, and
    by its rule for ROUGE-L). The same texts give the same numbers. InputError as in ``score``."""
    same = {"language": language, "convention": convention, "append_period": append_period}
    one, two = (_Texts.of(hypotheses, references, **same) for hypotheses in (first, second))  # type: ignore[arg-type]
    wanted: dict[str, tuple[Any, Callable[[Sequence[str]], Sequence[str]]]] = {
        "bleu4": (_bleu(4, convention, one.by_character), one.split),
        "chrf": (CHRF(), list),
    }
    found = {}
    for name, (metric, split) in wanted.items():
        systems = [("first", split(one.hypotheses)), ("second", split(two.hypotheses))]
        test = PairedTest(systems, {name: metric}, [split(one.references)], test_type="bs", n_samples=samples)
        _, results = test()
        ours, theirs = next(values for key, values in results.items() if key != "System")
        found[name] = _compared(ours.score, ours.ci, theirs.score, theirs.ci, theirs.p_value)
    ours_each, theirs_each = (
        _rouge_l_each(each.hypotheses, each.references, _beta_of_the_field, each.by_character) for each in (one, two)
    )
    found["rouge_l"] = _compare_means(ours_each, theirs_each, samples)
    return found


def _compare_means(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], samples: int) -> Compared:
    """As sacrebleu's paired bootstrap, for a score that is the mean of the sentences' (0-1)."""
    drawn = np.random.default_rng(12345).choice(len(first), size=(samples, len(first)), replace=True)
    ours, theirs = 100 * first[drawn].mean(1), 100 * second[drawn].mean(1)
    difference = abs(100 * (second.mean() - first.mean()))
    differences = np.abs(theirs - ours)
    p = (1 + int((differences - differences.mean() > difference).sum())) / (1 + samples)
    return _compared(100 * first.mean(), _interval(ours), 100 * second.mean(), _interval(theirs), p)


def _compared(first: float, first_interval: float, second: float, second_interval: float, p: float) -> Compared:
    p = 1.0 if first == second else p
    return Compared(float(first), float(first_interval), float(second), float(second_interval), p)


def _interval(scores: npt.NDArray[np.float64]) -> float:
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(high - low) / 2


def score_shuffled(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    language: str,
    convention: Convention = "slt",
    append_period: bool = False,
    seed: int = 0,
) -> float:
    """BLEU-4 (0-100) of every hypothesis against the reference of *another* clip.

    What is left is what fluent text of the corpus gets without looking at the video; a model whose true score is no
    better reads the grammar and not the signing. Needs two clips or more.
    """
    others = derangement(len(references), seed)
    shuffled = [references[i] for i in others]
    found = score(hypotheses, shuffled, language=language, convention=convention, append_period=append_period)
    return float(found["bleu4"])


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
    return 100 * float(_rouge_l_each(hypotheses, references, _beta_of_the_field, by_character).mean())


def rouge_l_slrt(hypotheses: Sequence[str], references: Sequence[str], *, by_character: bool = False) -> float:
    """ROUGE-L of FangyunWei/SLRT (TwoStreamNetwork/utils/external_metrics/Rouge.py), which MMTLB, TwoStream-SLT and
    their successors report: the same F, but with beta = P / R of each sentence. 0-100."""
    return 100 * float(_rouge_l_each(hypotheses, references, _beta_of_slrt, by_character).mean())


def _rouge_l_each(
    hypotheses: Sequence[str], references: Sequence[str], beta_of: _Beta, by_character: bool
) -> npt.NDArray[np.float64]:
    """F of each sentence, 0-1."""
    found = np.zeros(len(references))
    for i, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True)):
        ours, theirs = (
            list("".join(text.split())) if by_character else text.split() for text in (hypothesis, reference)
        )
        common = _longest_common_subsequence(ours, theirs)
        if common:
            precision, recall = common / len(ours), common / len(theirs)
            beta = beta_of(precision, recall)
            found[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return found


def _beta_of_the_field(precision: float, recall: float) -> float:
    return ROUGE_BETA


def _beta_of_slrt(precision: float, recall: float) -> float:
    return precision / recall


def one_line(text: str) -> str:
    """``text`` without characters that no text file holds and with single spaces between words.

    The scores are those of the texts in this form, so that a file with one sentence per line gives the same ones.
    """
    return " ".join(_UNWRITABLE.sub(" ", text).split())


@dataclass(frozen=True)
class _Texts:
    """Both sides as they are scored. by_character: a token is a character."""

    hypotheses: list[str]
    references: list[str]
    by_character: bool
    spaced: bool

    @classmethod
    def of(
        cls,
        hypotheses: Sequence[str],
        references: Sequence[str],
        *,
        language: str,
        convention: Convention,
        append_period: bool,
    ) -> _Texts:
        if not references or len(hypotheses) != len(references):
            raise InputError(
                f"{len(hypotheses)} hypotheses and {len(references)} references; expected the same number, at least one"
            )
        end = " ." if append_period else ""
        ours, theirs = ([one_line(text + end) for text in texts] for texts in (hypotheses, references))
        by_character = _is_chinese(language)
        return cls(ours, theirs, by_character, by_character and convention == "slt")

    def split(self, texts: Sequence[str]) -> list[str]:
        """As BLEU gets them: what sacrebleu is to split no further has a space between any two characters."""
        return [" ".join(text) for text in texts] if self.spaced else list(texts)


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
