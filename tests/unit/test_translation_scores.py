"""Translation scores against hand-computed tables and against the sacrebleu command."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sltscale.errors import InputError
from sltscale.evaluation.translation import compare, derangement, one_line, rouge_l, rouge_l_slrt, score, score_shuffled

GERMAN = (
    ["am tag wechselt sonne mit wolken", "im norden regen", "", "Und nun: die Wettervorhersage."],
    [
        "am tag scheint sonne mit wolken",
        "im süden fällt kräftiger regen",
        "guten abend",
        "Und nun die Wettervorhersage!",
    ],
)


def sacrebleu_command(folder: Path, hypotheses: list[str], references: list[str], *options: str) -> dict[str, float]:
    (folder / "hyp").write_text("".join(f"{text}\n" for text in hypotheses), encoding="utf-8")
    (folder / "ref").write_text("".join(f"{text}\n" for text in references), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-m", "bleu", "chrf", "-w", "12", *options]
    output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600).stdout
    return {result["name"]: result["score"] for result in json.loads(output)}


def test_bleu_by_hand() -> None:
    # hypothesis: a b c d e x (6), reference: a b c d e f g (7)
    # matches / n-grams of the hypothesis: 5/6, 4/5, 3/4, 2/3; brevity penalty exp(1 - 7/6)
    penalty = math.exp(1 - 7 / 6)
    precisions = [5 / 6, 4 / 5, 3 / 4, 2 / 3]
    for convention in ("slt", "13a"):
        found = score(["a b c d e x"], ["a b c d e f g"], language="en", convention=convention)  # type: ignore[arg-type]
        for order in (1, 2, 3, 4):
            expected = 100 * penalty * math.prod(precisions[:order]) ** (1 / order)
            assert found[f"bleu{order}"] == pytest.approx(expected, abs=1e-9)
        assert found["length_ratio"] == pytest.approx(6 / 7)


def test_bleu_1_is_not_the_unigram_precision() -> None:
    # every word is right, so the precision is 100; the hypothesis is half as long, so BLEU-1 is 100 exp(1 - 2)
    found = score(["a b"], ["a b c d"], language="en")
    assert found["bleu1"] == pytest.approx(100 * math.exp(-1), abs=1e-9)


def test_conventions_smooth_differently_by_hand() -> None:
    # a b c against a b d: 2/3, 1/2, 0/1; no 4-gram exists
    found = score(["a b c"], ["a b d"], language="en", convention="slt")
    assert found["bleu1"] == pytest.approx(100 * 2 / 3, abs=1e-9)
    assert found["bleu2"] == pytest.approx(100 * math.sqrt(2 / 3 * 1 / 2), abs=1e-9)
    assert found["bleu3"] == found["bleu4"] == 0  # floor 0: an order without a match makes it nothing
    smoothed = score(["a b c"], ["a b d"], language="en", convention="13a")
    assert smoothed["bleu3"] == pytest.approx(100 * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3), abs=1e-9)


def test_effective_order_of_the_slt_convention() -> None:
    # three words have no 4-gram: the slt convention then stops at order 3, sacrebleu's default does not
    assert score(["a b c"], ["a b c"], language="en", convention="slt")["bleu4"] == pytest.approx(100)
    assert score(["a b c"], ["a b c"], language="en", convention="13a")["bleu4"] == 0


def test_punctuation_and_case() -> None:
    assert score(["Hallo, Welt"], ["Hallo , Welt"], language="de", convention="13a")["bleu1"] == pytest.approx(100)
    # "Hallo," "Welt" against "Hallo" "," "Welt": one of two words, brevity exp(1 - 3/2)
    split = score(["Hallo, Welt"], ["Hallo , Welt"], language="de", convention="slt")
    assert split["bleu1"] == pytest.approx(50 * math.exp(-0.5), abs=1e-9)
    assert score(["hallo"], ["Hallo"], language="de")["bleu1"] == 0


def test_rouge_l_by_hand() -> None:
    # LCS of "the cat sat on mat" and "the cat is on the mat": the cat on mat = 4; P 4/5, R 4/6, beta^2 1.44
    expected = 2.44 * (4 / 5) * (4 / 6) / (4 / 6 + 1.44 * 4 / 5)
    assert rouge_l(["the cat sat on mat"], ["the cat is on the mat"]) == pytest.approx(100 * expected, abs=1e-9)
    # mean over sentences: that one, a perfect one, an empty one
    three = rouge_l(["the cat sat on mat", "x", ""], ["the cat is on the mat", "x", "y"])
    assert three == pytest.approx(100 * (expected + 1) / 3, abs=1e-9)
    # order counts: words in reverse share a subsequence of one
    assert rouge_l(["c b a"], ["a b c"]) == pytest.approx(100 / 3, abs=1e-9)


def test_rouge_l_of_slrt_by_hand() -> None:
    # P 4/5, R 4/6, beta = P / R = 6/5: by chance the field's. With 1 of 4 words against 1 of 2: P 1/4, R 1/2, beta 1/2
    sentences = ["the cat sat on mat"], ["the cat is on the mat"]
    assert rouge_l_slrt(*sentences) == pytest.approx(rouge_l(*sentences), abs=1e-9)
    expected = (1 + 0.25) * 0.25 * 0.5 / (0.5 + 0.25 * 0.25)
    assert rouge_l_slrt(["a x y z"], ["a b"]) == pytest.approx(100 * expected, abs=1e-9)
    assert rouge_l(["a x y z"], ["a b"]) == pytest.approx(100 * 2.44 * 0.125 / (0.5 + 1.44 * 0.25), abs=1e-9)
    # the mean: that one, an empty hypothesis, one without a common word
    assert rouge_l_slrt(["a x y z", "", "q"], ["a b", "c", "r"]) == pytest.approx(100 * expected / 3, abs=1e-9)


# Each line worked out by hand: n-gram matches / n-grams of the hypotheses for orders 1 to 4, tokens of hypotheses and
# references, then ROUGE-L as (common, hypothesis, reference) tokens of every sentence. Convention slt, no smoothing.
TABLES = {
    "German": (
        "de",
        ["am abend regnet es im süden", "der wind weht schwach"],
        ["am abend regnet es im norden", "der wind weht schwach bis mäßig"],
        [(9, 10), (7, 8), (5, 6), (3, 4)],
        (10, 12),
        [(5, 6, 6), (4, 4, 6)],
    ),
    "German with an empty hypothesis": (
        "de",
        ["", "morgen scheint die sonne"],
        ["regen", "morgen scheint die sonne"],
        [(4, 4), (3, 3), (2, 2), (1, 1)],
        (4, 5),
        [(0, 0, 1), (4, 4, 4)],
    ),
    "Chinese": (
        "zh",
        ["今天天气很好", "明天下雨"],
        ["今天天气真好", "明天 有雨"],
        # 今天天气 好 and 明天 雨; 今天 天天 天气 and 明天; 今天天 天天气; 今天天气
        [(8, 10), (4, 8), (2, 6), (1, 4)],
        (10, 10),
        [(5, 6, 6), (3, 4, 4)],
    ),
    "English": (
        "en",
        ["i would like to go home", "go go go"],
        ["i would like to stay home", "go home now please"],
        # "go" of the second counts once; the only bigram of it that could match is "go home", which it has not
        [(6, 9), (3, 7), (2, 5), (1, 3)],
        (9, 10),
        [(5, 6, 6), (1, 3, 4)],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_by_hand(name: str) -> None:
    language, hypotheses, references, matches, (ours, theirs), common = TABLES[name]
    found = score(hypotheses, references, language=language)
    brevity = min(1.0, math.exp(1 - theirs / ours))
    for order in (1, 2, 3, 4):
        precisions = [hits / total for hits, total in matches[:order]]
        assert found[f"bleu{order}"] == pytest.approx(100 * brevity * math.prod(precisions) ** (1 / order), abs=1e-9)
    f_scores = []
    for lcs, hypothesis, reference in common:
        precision, recall = (lcs / hypothesis, lcs / reference) if lcs else (0, 1)
        f_scores.append(2.44 * precision * recall / (recall + 1.44 * precision))
    assert found["rouge_l"] == pytest.approx(100 * sum(f_scores) / len(f_scores), abs=1e-9)
    assert found["empty_hypotheses"] == hypotheses.count("")


def test_an_appended_period_counts_as_a_word() -> None:
    # a x . against a b . : 2/3 instead of 1/2; an empty hypothesis is the full stop alone, and still counted as empty
    assert score(["a x"], ["a b"], language="en")["bleu1"] == pytest.approx(50)
    found = score(["a x"], ["a b"], language="en", append_period=True)
    assert found["bleu1"] == pytest.approx(100 * 2 / 3)
    assert found["signature"]["convention"] == "slt|level:word|period:appended"
    empty = score([""], ["a b"], language="en", append_period=True)
    assert (empty["length_ratio"], empty["empty_hypotheses"]) == (pytest.approx(1 / 3), 1)
    # 我 他 . against 我 你 .
    assert score(["我他"], ["我你"], language="zh", append_period=True)["bleu1"] == pytest.approx(100 * 2 / 3)


def test_chinese_is_scored_by_characters() -> None:
    # 我 爱 你 们 against 我 爱 他 们: 3/4, then 1/3 (我爱), no trigram
    for convention in ("slt", "13a"):
        found = score(["我爱你们"], ["我爱他们"], language="zh-CN", convention=convention)  # type: ignore[arg-type]
        assert found["bleu1"] == pytest.approx(75, abs=1e-9)
        assert found["bleu2"] == pytest.approx(100 * math.sqrt(3 / 4 * 1 / 3), abs=1e-9)
        assert found["rouge_l"] == pytest.approx(75, abs=1e-9)
    assert score(["我 爱你 们"], ["我爱 他们"], language="zh")["rouge_l"] == pytest.approx(75, abs=1e-9)
    assert score(["我爱你们"], ["我爱他们"], language="de")["bleu1"] == 0


def test_default_convention_equals_the_sacrebleu_command(tmp_path: Path) -> None:
    command = sacrebleu_command(tmp_path, *GERMAN)
    found = score(*GERMAN, language="de", convention="13a")
    assert found["bleu4"] == pytest.approx(command["BLEU"], abs=1e-9)
    assert found["chrf"] == pytest.approx(command["chrF2"], abs=1e-9)
    assert 0 < found["bleu4"] < 100


def test_slt_convention_equals_the_sacrebleu_command(tmp_path: Path) -> None:
    # the command cannot set the effective order; with sentences of four words and more it makes no difference
    hypotheses, references = ["am tag wechselt sonne mit wolken ."], ["am tag scheint sonne mit wolken ."]
    options = ("-tok", "none", "-s", "floor", "-sv", "0", "--force")
    command = sacrebleu_command(tmp_path, hypotheses, references, *options)
    assert score(hypotheses, references, language="de")["bleu4"] == pytest.approx(command["BLEU"], abs=1e-9)


def test_chinese_equals_the_sacrebleu_command(tmp_path: Path) -> None:
    hypotheses, references = ["我 们明天去北京,好吗?", "今天天气好"], ["我们明天去上海,好吗?", "今天的天气很好"]
    command = sacrebleu_command(tmp_path, hypotheses, references, "-tok", "zh")
    found = score(hypotheses, references, language="zh", convention="13a")
    assert found["bleu4"] == pytest.approx(command["BLEU"], abs=1e-9)
    assert found["chrf"] == pytest.approx(command["chrF2"], abs=1e-9)


def test_signatures_name_what_was_done() -> None:
    plain = score(*GERMAN, language="de", convention="13a")["signature"]
    assert plain["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert plain["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert plain["rouge_l"] == "beta:1.2|tok:word|mean:sentences"
    field = score(*GERMAN, language="de")["signature"]
    assert field["bleu"].startswith("nrefs:1|case:mixed|eff:yes|tok:none|smooth:floor[0.00]|version:")
    assert field["convention"] == "slt|level:word"
    assert score(["我"], ["我"], language="zh")["signature"]["convention"] == "slt|level:character"


@pytest.mark.parametrize("convention", ["slt", "13a"])
def test_empty_hypotheses_score_nothing_and_are_counted(convention: str) -> None:
    found = score(["", "  ", ""], ["a b", "c", "d e f"], language="en", convention=convention)  # type: ignore[arg-type]
    assert [found[key] for key in ("bleu1", "bleu4", "chrf", "rouge_l", "length_ratio")] == [0, 0, 0, 0, 0]
    assert found["empty_hypotheses"] == found["sentences"] == 3


def test_one_empty_hypothesis_counts_against_the_corpus() -> None:
    found = score(["a b c d", ""], ["a b c d", "a b c d"], language="en")
    assert found["bleu4"] == pytest.approx(100 * math.exp(-1), abs=1e-9)  # half the length
    assert found["rouge_l"] == pytest.approx(50)
    assert found["empty_hypotheses"] == 1


@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_unequal_numbers_are_refused(hypotheses: list[str], references: list[str]) -> None:
    with pytest.raises(InputError, match=r"hypotheses and .* references"):
        score(hypotheses, references, language="en")


def test_unknown_convention_is_refused() -> None:
    with pytest.raises(InputError, match="valid: slt, 13a"):
        score(["a"], ["a"], language="en", convention="intl")  # type: ignore[arg-type]


def test_one_line() -> None:
    assert one_line(" a\tb\r\n\x00 c\u2028d \x85e ") == "a b c d e"


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_derangement_moves_everything(n: int) -> None:
    found = derangement(n, seed=5)
    assert sorted(found) == list(range(n))
    assert all(i != other for i, other in enumerate(found))
    assert found == derangement(n, seed=5)
    assert n < 10 or found != derangement(n, seed=6)


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_shuffle(n: int) -> None:
    with pytest.raises(InputError, match="at least two"):
        derangement(n, seed=0)


def test_shuffled_score_is_low_for_a_reader_and_unchanged_for_a_parrot() -> None:
    sentences = [f"the {i} cats sleep near house number {i * 7} today" for i in range(20)]
    assert score(sentences, sentences, language="en")["bleu4"] == pytest.approx(100)
    assert score_shuffled(sentences, sentences, language="en", seed=1) < 50
    parrot = [sentences[0]] * 20
    true = score(parrot, sentences, language="en")["bleu4"]
    assert score_shuffled(parrot, sentences, language="en", seed=1) == pytest.approx(true)


def test_the_same_system_twice_does_not_differ() -> None:
    references = [f"am {day}. scheint die sonne im {place}" for day in range(12) for place in ("süden", "norden")]
    ours = [text.replace("sonne", "wolke") if i % 3 else text for i, text in enumerate(references)]
    for name, found in compare(ours, ours, references, language="de", samples=200).items():
        assert found.p == 1, name
        assert found.first == found.second == pytest.approx(score(ours, references, language="de")[name], abs=1e-4)
        assert 0 < found.first_interval < 30


def test_a_better_system_is_told_from_a_worse() -> None:
    references = [f"am {day}. scheint die sonne im {place}" for day in range(25) for place in ("süden", "norden")]
    worse = [" ".join(text.split()[:3]) + " oft" if i % 2 else text for i, text in enumerate(references)]
    better = [text if i % 25 else "regen" for i, text in enumerate(references)]
    one_word = ["am 0. scheint die sonne nicht", *references[1:]]
    for name, found in compare(worse, better, references, language="de", convention="13a", samples=300).items():
        assert found.second > found.first
        assert found.p < 0.01, name
    for name, found in compare(references, one_word, references, language="de", samples=300).items():
        assert found.first == pytest.approx(100)
        assert found.p > 0.2, name


def test_intervals_shrink_with_the_corpus() -> None:
    references = [f"am {day}. scheint die sonne" for day in range(16)]
    ours = [text if i % 2 else "am montag regnet es" for i, text in enumerate(references)]
    small = compare(ours, ours, references, language="de", samples=400)
    large = compare(ours * 9, ours * 9, references * 9, language="de", samples=400)
    for name in small:
        assert large[name].first_interval == pytest.approx(small[name].first_interval / 3, rel=0.3)
