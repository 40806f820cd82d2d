"""The synthetic corpus: its language, its signs, its files."""

import csv
import itertools
import random
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import sacrebleu
from PIL import Image

from sltscale.data.synthetic.corpus import ANNOTATIONS, COLUMNS, SIGNERS, make_corpus
from sltscale.data.synthetic.drawing import Painter, draw_signer
from sltscale.data.synthetic.language import GLOSSES, LANGUAGES, Sentence, draw_sentence
from sltscale.data.synthetic.signs import FORMS, HAND, perform, perform_sentences, rest
from sltscale.errors import InputError

TOOL = Path(__file__).parents[2] / "tools" / "make_synthetic.py"
CLIPS, SEED = 24, 3


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    rng = random.Random(1)  # noqa: S311
    return [draw_sentence(rng) for _ in range(20_000)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "corpus"
    assert make_corpus(out, clips=CLIPS, seed=SEED, workers=1) == out / ANNOTATIONS
    return out


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _seconds(timestamp: str) -> Fraction:
    hours, minutes, seconds = timestamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- the language


@pytest.mark.parametrize(
    ("sentence", "glosses", "german", "english"),
    [
        (
            Sentence("TEACHER", "BUY", thing="APPLE", adjective="RED", time="TOMORROW"),
            "TOMORROW APPLE RED TEACHER BUY",
            "morgen kauft die lehrerin einen roten apfel",
            "tomorrow the teacher buys a red apple",
        ),
        (
            Sentence("CHILD", "SHOW", thing="BOOK", recipient="FATHER", modal="WANT", negated=True),
            "BOOK CHILD FATHER SHOW WANT NOT",
            "das kind will dem vater kein buch zeigen",
            "the child does not want to show the father a book",
        ),
        (
            Sentence("MOTHER", "FIND", thing="BALL", number="TWO", adjective="OLD", time="YESTERDAY", question=True),
            "YESTERDAY BALL OLD TWO MOTHER FIND QUESTION",
            "fand die mutter gestern zwei alte bälle",
            "did the mother find two old balls yesterday",
        ),
        (
            Sentence("DOCTOR", "WAIT", place="STATION", time="YESTERDAY", modal="CAN", negated=True),
            "YESTERDAY STATION DOCTOR WAIT CAN NOT",
            "gestern konnte der arzt nicht am bahnhof warten",
            "yesterday the doctor could not wait at the station",
        ),
        (
            Sentence("BAKER", "SEEK", thing="FLOWER", adjective="OLD"),
            "FLOWER OLD BAKER SEEK",
            "der bäcker sucht eine alte blume",
            "the baker looks for an old flower",
        ),
    ],
)
def test_grammar(sentence: Sentence, glosses: str, german: str, english: str) -> None:
    assert " ".join(sentence.glosses) == glosses
    assert sentence.text("de") == german
    assert sentence.text("en") == english


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_and_signs_determine_each_other(sentences: list[Sentence], language: str) -> None:
    by_glosses, by_text = defaultdict(set), defaultdict(set)
    for sentence in sentences:
        by_glosses[sentence.glosses].add(sentence.text(language))
        by_text[sentence.text(language)].add(sentence.glosses)
    assert len(by_glosses) > 10_000
    assert {len(texts) for texts in by_glosses.values()} == {1}
    assert {len(glosses) for glosses in by_text.values()} == {1}
    assert all(3 <= len(glosses) <= 6 for glosses in by_glosses)
    assert {sign for glosses in by_glosses for sign in glosses} == set(GLOSSES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_wrongly_paired_sentences_share_little(sentences: list[Sentence], language: str) -> None:
    texts = list(dict.fromkeys(sentence.text(language) for sentence in sentences))[:400]
    assert sacrebleu.corpus_bleu(texts[1:] + texts[:1], [texts]).score < 8
    assert sacrebleu.corpus_bleu(texts, [texts]).score == pytest.approx(100)


def test_text_has_words_that_no_sign_carries(sentences: list[Sentence]) -> None:
    """Articles and auxiliaries come with whatever signs there are: none is common to all their sentences."""
    for language, words in (("de", ("der", "die", "dem", "einen", "eine")), ("en", ("the", "a", "does", "did", "in"))):
        for word in words:
            having = [set(s.glosses) for s in sentences if word in s.text(language).split()]
            assert len(having) > 100
            assert set.intersection(*having) <= {"YESTERDAY"}, word  # which makes "does" a "did"


def test_word_order_is_not_sign_order(sentences: list[Sentence]) -> None:
    """The object is signed before the subject and the verb after both; German says subject, then object."""
    transitive = [s for s in sentences if s.thing and not s.number and not s.modal][:500]
    for sentence in transitive:
        signs = sentence.glosses
        assert signs.index(sentence.thing) < signs.index(sentence.subject) < signs.index(sentence.verb)
        words = sentence.text("en").split()
        subject = words.index({"NEIGHBOUR": "neighbour"}.get(sentence.subject, sentence.subject.lower()))
        assert subject < words.index(sentence.thing.lower())


# ---------------------------------------------------------------- the signs


def test_signs_are_enough_and_have_hands_and_face() -> None:
    assert set(FORMS) == set(GLOSSES)
    assert len(FORMS) >= 35
    assert {form.hands for form in FORMS.values()} == {"one", "both", "alternate", "base"}
    assert len({form.handshape for form in FORMS.values()}) >= 8
    assert len({form.face for form in FORMS.values()}) >= 6
    phases = np.linspace(0, 1, 12)
    for gloss, form in FORMS.items():
        travelled = np.abs(np.diff(perform(form, phases)[:, :2], axis=0)).sum()
        assert travelled > 0.15, gloss


def test_signs_look_different_at_64_pixels() -> None:
    painter = Painter(draw_signer(0, 0), 64)
    pictures = {
        gloss: np.stack([np.asarray(painter.draw(pose)) for pose in perform(form, np.array([0.2, 0.5, 0.8]))])
        for gloss, form in FORMS.items()
    }
    for (a, x), (b, y) in itertools.combinations(pictures.items(), 2):
        changed = (np.abs(x.astype(int) - y).max(axis=-1) > 40).mean()
        assert changed > 0.05, f"{a} and {b} differ in {changed:.1%} of the pixels"


def test_hands_glide_from_sign_to_sign_without_a_pause() -> None:
    glosses = ("TOMORROW", "PICTURE", "RED", "TEACHER", "BUY", "QUESTION")
    poses, [(first, end)] = perform_sentences([glosses], fps=100.0, speed=1.0, rng=random.Random(0))  # noqa: S311
    hand = poses[:, :2]
    step = np.hypot(*np.diff(hand, axis=0).T)
    assert step.max() < 0.15  # no jump: 0.01 s apart
    lap = rest(np.zeros(1))[0, :2]
    away = np.hypot(*(hand - lap).T) > 0.1
    inside = np.flatnonzero(away)
    assert away[inside[0] : inside[-1] + 1].all()  # away from the lap from the first sign to the last
    assert first <= inside[0] <= end
    np.testing.assert_allclose(poses[0], rest(np.zeros(1))[0])
    np.testing.assert_allclose(poses[-1], rest(np.zeros(1))[0])
    assert 5 * 0.4 < (end - first) / 100 < 7 * 0.65


def test_speed_and_sentence_vary_in_length() -> None:
    lengths = [
        len(perform_sentences([("RED", "BIG")], fps=25.0, speed=speed, rng=random.Random(seed))[0])  # noqa: S311
        for speed, seed in ((0.85, 0), (1.2, 0), (1.0, 1), (1.0, 2))
    ]
    assert lengths[0] > lengths[1]
    assert lengths[2] != lengths[3]


def test_weak_hand_mirrors_two_handed_signs() -> None:
    pose = perform(FORMS["BIG"], np.array([1.0]))[0]
    np.testing.assert_allclose(pose[HAND], -pose[0])
    np.testing.assert_allclose(pose[HAND + 1 : 2 * HAND], pose[1:HAND])


def test_signers_differ_and_are_reproducible() -> None:
    signers = [draw_signer(0, number) for number in range(20)]
    assert signers == [draw_signer(0, number) for number in range(20)]
    assert draw_signer(1, 0) != signers[0]
    pose = rest(np.zeros(1))[0]
    pictures = [np.asarray(Painter(signer, 64).draw(pose)).astype(int) for signer in signers]
    for a, b in itertools.combinations(pictures, 2):
        assert np.abs(a - b).mean() > 4
    for field in ("shoulders", "head", "speed", "zoom", "shift"):
        assert len({getattr(signer, field) for signer in signers}) == 20


# ---------------------------------------------------------------- the files


def test_annotations_have_openasl_columns(corpus: Path) -> None:
    assert (corpus / ANNOTATIONS).read_text().splitlines()[0].split("\t") == list(COLUMNS)
    rows = _table(corpus / ANNOTATIONS)
    assert len(rows) == CLIPS
    assert {row["split"] for row in rows} == {"train", "valid", "test"}
    assert len({row["vid"] for row in rows}) == CLIPS
    for row in rows:
        assert len(row["yid"]) == 11
        assert row["vid"] == f"{row['yid']}-{row['start']}-{row['end']}"
        assert row["raw-text"] == row["raw-text"].lower().strip()
        assert set(row["gloss"].split()) <= set(GLOSSES)


def test_splits_share_no_sentence_and_test_no_signer(corpus: Path) -> None:
    signer = {row["yid"]: row["signer"] for row in _table(corpus / SIGNERS)}
    rows = _table(corpus / ANNOTATIONS)
    texts = {split: [row["raw-text"] for row in rows if row["split"] == split] for split in ("train", "valid", "test")}
    held_out = texts["valid"] + texts["test"]
    assert len(set(held_out)) == len(held_out)
    assert not set(held_out) & set(texts["train"])
    signers = {split: {signer[row["yid"]] for row in rows if row["split"] == split} for split in texts}
    assert not signers["test"] & (signers["train"] | signers["valid"])
    splits = defaultdict(set)
    for row in rows:
        splits[row["yid"]].add(row["split"])
    assert all(len(of_video) == 1 for of_video in splits.values())


def test_videos_are_h264_and_hold_their_spans(corpus: Path) -> None:
    spans = defaultdict(list)
    for row in _table(corpus / ANNOTATIONS):
        spans[row["yid"]].append((_seconds(row["start"]), _seconds(row["end"]), len(row["gloss"].split())))
    assert len(spans) > 3
    assert max(map(len, spans.values())) == 4
    rates = set()
    for yid, of_video in spans.items():
        with av.open(str(corpus / "videos" / f"{yid}.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            rates.add(stream.average_rate)
            times = [frame.pts * frame.time_base for frame in container.decode(stream)]
        previous = Fraction(0)
        for start, end, signs in of_video:
            assert previous < start < end <= times[-1]
            previous = end
            # a frame begins within the millisecond after start, and one after end: the span is frame-exact
            for boundary in (start, end):
                assert any(0 <= time - boundary < Fraction(1, 1000) for time in times)
            assert 8 * signs < sum(start <= time < end for time in times) < 22 * signs
    assert rates == {Fraction(25), Fraction(24), Fraction(30000, 1001)}


def test_same_seed_same_bytes_with_two_workers(corpus: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "again", clips=CLIPS, seed=SEED, workers=2)
    again = _contents(tmp_path / "again")
    assert again == _contents(corpus)
    make_corpus(tmp_path / "other", clips=8, seed=SEED + 1, workers=1)
    other = _contents(tmp_path / "other")
    assert not {data for name, data in other.items()} & {data for name, data in again.items()}


def test_language_changes_the_text_only(tmp_path: Path) -> None:
    make_corpus(tmp_path / "de", clips=6, seed=SEED, workers=1)
    make_corpus(tmp_path / "en", clips=6, seed=SEED, language="en", workers=1)
    german, english = _contents(tmp_path / "de"), _contents(tmp_path / "en")
    assert german.pop(ANNOTATIONS) != english.pop(ANNOTATIONS)
    assert german == english
    rows = zip(_table(tmp_path / "de" / ANNOTATIONS), _table(tmp_path / "en" / ANNOTATIONS), strict=True)
    for de, en in rows:
        assert de["gloss"] == en["gloss"]
        assert de["raw-text"] != en["raw-text"]


def test_interrupted_corpus_is_completed(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    make_corpus(out, clips=3, seed=SEED, workers=1)
    whole = _contents(out)
    (out / ANNOTATIONS).unlink()
    damaged = next((out / "videos").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    make_corpus(out, clips=3, seed=SEED, workers=1)
    assert _contents(out) == whole
    with pytest.raises(InputError, match="holds a finished corpus"):
        make_corpus(out, clips=3, seed=SEED, workers=1)


def test_smallest_corpus_has_every_split(tmp_path: Path) -> None:
    rows = _table(make_corpus(tmp_path / "three", clips=3, seed=0, workers=1))
    assert sorted(row["split"] for row in rows) == ["test", "train", "valid"]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=600)


def test_command_draws_a_corpus(tmp_path: Path) -> None:
    done = _run("--out", str(tmp_path / "c"), "--clips", "9", "--seed", "1", "--language", "en", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert len(_table(tmp_path / "c" / ANNOTATIONS)) == 9


def test_command_refuses_bad_input_in_one_line(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("")
    for arguments, reason in (
        (("--out", str(tmp_path / "c"), "--clips", "2"), "at least 3"),
        (("--out", str(tmp_path / "c"), "--clips", "9", "--workers", "0"), "workers is 0"),
        (("--out", str(full), "--clips", "9"), "thesis.txt"),
        (("--out", str(tmp_path / "file"), "--clips", "9"), "cannot be used"),
        (("--contact-sheet", str(tmp_path / "absent" / "sheet.png")), "cannot be written"),
    ):
        done = _run(*arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        assert reason in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert (full / "thesis.txt").read_text() == "precious"
    assert not (tmp_path / "c").exists()


def test_command_draws_a_contact_sheet(tmp_path: Path) -> None:
    done = _run("--contact-sheet", str(tmp_path / "sheet.png"))
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500
        assert sheet.height > 400
