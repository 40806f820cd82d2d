"""Pseudo-glosses: the same for the same sentences, what is in a lexicon's folder, vectors, and what is refused."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from sltscale import cli
from sltscale.data.lexicon import Lexicon, build_lexicon, load_lexicon
from sltscale.data.tagging import tagger
from sltscale.data.word_vectors import Vectors, corpus_vectors, published_vectors
from sltscale.errors import InputError

SENTENCES = ["heute regnet es", "es regnet morgen", "heute scheint die sonne", "heute regnet es", "  "]


def built(sentences: list[str], max_share: float = 1.0) -> Lexicon:
    def vectors(glosses: object, of_sentences: object) -> Vectors:
        return corpus_vectors(glosses, of_sentences, 4)  # type: ignore[arg-type]

    return build_lexicon(sentences, tagger("words").analyse, vectors, max_share=max_share, origin={"tagger": "words"})


# --- the lexicon -----------------------------------------------------------------------------------------------------


def test_sorted_and_the_same_for_sentences_in_any_order() -> None:
    one, other = built(SENTENCES), built(SENTENCES[::-1])
    assert one.glosses == ("die", "es", "heute", "morgen", "regnet", "scheint", "sonne") == other.glosses
    assert one.of_sentence == other.of_sentence
    assert one.vectors.tobytes() == other.vectors.tobytes()
    assert one.of_sentence["es regnet morgen"] == (1, 3, 4)
    targets = one.targets(["es regnet morgen", "unbekannt"])
    assert targets.tolist() == [[0, 1, 0, 1, 1, 0, 0], [0] * 7]


def test_words_of_too_many_sentences_are_left_out() -> None:
    lexicon = built(SENTENCES, max_share=0.4)  # of 3 different sentences: those in one only
    assert lexicon.glosses == ("die", "morgen", "scheint", "sonne")
    assert lexicon.of_sentence["heute regnet es"] == ()
    with pytest.raises(InputError, match="no pseudo-gloss was found in 3 sentences"):
        built(SENTENCES, max_share=0.1)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    lexicon = built(SENTENCES)
    for _ in range(2):  # the second replaces the first
        lexicon.save(tmp_path / "lexicon")
    loaded = load_lexicon(tmp_path / "lexicon")
    assert (loaded.glosses, loaded.of_sentence, loaded.origin) == (lexicon.glosses, lexicon.of_sentence, lexicon.origin)
    assert loaded.vectors.tobytes() == lexicon.vectors.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["lexicon"]


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no glosses.txt; expected a folder made by sltscale lexicon build"):
        load_lexicon(tmp_path)
    damages = {
        "glosses.txt": ("es\ndie\n", "ascending order"),
        "sentences.jsonl": ('{"text": "x", "glosses": ["fremd"]}\n', "cannot be read"),
        "lexicon.json": ("{", "cannot be read"),
        "vectors.safetensors": ("nothing", "cannot be read"),
    }
    for name, (content, message) in damages.items():
        built(SENTENCES).save(tmp_path / "lexicon")
        if name == "glosses.txt":
            (tmp_path / "lexicon" / "sentences.jsonl").write_text("")
        (tmp_path / "lexicon" / name).write_text(content)
        with pytest.raises(InputError, match=message) as refused:
            load_lexicon(tmp_path / "lexicon")
        assert "\n" not in str(refused.value)
    short = built(SENTENCES)
    Lexicon(short.glosses, short.of_sentence, short.vectors[:5]).save(tmp_path / "lexicon")
    with pytest.raises(InputError, match=r"holds float32 \[5, 4\], expected float32 \[7, width\]"):
        load_lexicon(tmp_path / "lexicon")


def test_a_lexicon_of_other_sentences_is_refused() -> None:
    built(SENTENCES).check_covers(SENTENCES[:4], "mine")
    with pytest.raises(InputError, match="lexicon mine knows 1 of 2 training sentences"):
        built(SENTENCES).check_covers(["heute regnet es", "fremd"], "mine")


# --- taggers ---------------------------------------------------------------------------------------------------------


def test_words_as_they_stand() -> None:
    found = list(tagger("words").analyse(["Über-Land, 3 Äpfel_x!", "明天 OK", ""]))
    assert found == [["über", "land", "3", "äpfel", "x"], ["明", "天", "ok"], []]


def test_german_and_english_lemmas() -> None:
    pytest.importorskip("HanTa", reason="the extra lexicon is not installed")
    german = tagger("shipped", "de-DE")
    assert german.name.startswith("HanTa 1.")
    sentences = ["morgen spielen die zwei kinder mit ihrem alten ball .", ""]
    found = [set(words) for words in german.analyse(sentences)]
    assert {"morgen", "spielen", "zwei", "kind", "alt", "ball"} <= found[0]
    assert not {"die", "mit", "ihrem", "."} & found[0] and found[1] == set()
    english = set(next(iter(tagger("shipped", "en").analyse(["Tomorrow she will bring two old books to school ."]))))
    assert {"tomorrow", "she", "bring", "two", "old", "book", "school"} <= english
    assert not {"to", "will", "."} & english


def test_chinese_words_whether_or_not_there_are_spaces() -> None:
    pytest.importorskip("jieba", reason="the extra lexicon is not installed")
    chinese = tagger("shipped", "zh")
    one, other = chinese.analyse(["明天他来学校。", "明 天 他 来 学 校 。"])
    assert one == other == ["明天", "他", "来", "学校"]


def test_a_tagger_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no tagger for language 'sw' is installed: expected one of de, en, zh"):
        tagger("auto", "sw")
    with pytest.raises(InputError, match="spaCy model 'xx_none' is not installed"):
        tagger("xx_none", "de")


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_words_that_share_sentences_lie_close() -> None:
    sentences = [["regen", "nass"], ["regen", "nass", "heute"], ["sonne", "warm"], ["sonne", "warm", "heute"], ["x"]]
    words = sorted({word for sentence in sentences for word in sentence})
    vectors = dict(zip(words, corpus_vectors(words, sentences, 4), strict=True))
    assert vectors["regen"] @ vectors["nass"] > 0.8 > 0.3 > vectors["regen"] @ vectors["warm"]
    for width in (2, 6, 9):
        lengths = np.linalg.norm(corpus_vectors(words, sentences, width), axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_vec(tmp_path: Path) -> None:
    path = tmp_path / "a.vec"
    path.write_text("3 2\nregen 1 -2.5\nüber 0.5 0\nfremd 9 9\n", encoding="utf-8")
    vectors, missing = published_vectors(path, ["nass", "regen", "über"])
    assert missing == ["nass"]
    assert vectors[1:].tolist() == [[1, -2.5], [0.5, 0]]
    assert vectors[0].any() and vectors.tobytes() == published_vectors(path, ["nass", "regen", "über"])[0].tobytes()


# By facebookresearch/fastText 0.9.2's own get_word_vector of the model below.
FASTTEXT = {
    "regen": [-0.33333, 0.08333, 0.5, -0.13542],
    "über": [-1.55, 0.55, 1.3875, -2.825],
    "明天": [-0.58333, 1.9375, -3.95833, 0.66667],
    "unbekannt": [-0.19737, 0.44079, -0.25, -0.94079],
    "größe": [1.77273, -2.78409, 1.84091, -0.42045],
    "b": [2.0, -1.79167, -1.375, 3.25],
    "x": [-0.1875, 1.28125, -0.40625, 1.0625],
}


def fasttext_model(path: Path, version: int = 12, pruned: int = -1, cut: int = 0) -> Path:
    """Five words and 20 buckets of n-grams of 2 and 3 characters, width 4."""
    words = ["</s>", "regen", "über", "明天", "x"]
    matrix = (np.arange(25 * 4).reshape(25, 4) * 37 % 101 - 50).astype("<f4") / 8
    content = struct.pack("<2i", 793712314, version)
    content += struct.pack("<12id", 4, 5, 1, 1, 5, 1, 2, 2, 20, 2, 3, 100, 1e-4)
    content += struct.pack("<3i2q", 5, 5, 0, 99, pruned)
    content += b"".join(word.encode() + b"\0" + struct.pack("<qb", 7, 0) for word in words)
    content += struct.pack("<?2q", False, 25, 4) + matrix.tobytes()
    path.write_bytes(content[: len(content) - cut])
    return path


def test_fasttext_model_gives_fasttexts_vectors(tmp_path: Path) -> None:
    vectors, missing = published_vectors(fasttext_model(tmp_path / "a.bin"), list(FASTTEXT))
    assert missing == []
    np.testing.assert_allclose(vectors, list(FASTTEXT.values()), atol=6e-6)


def test_vectors_that_cannot_be_read_are_refused_in_one_line(tmp_path: Path) -> None:
    vec = tmp_path / "b.vec"
    contents = {
        "nothing here\n": "expected a .vec header",
        "1 3\nregen 1 2\n": "b.vec:2: expected 3 finite numbers, found 2",
        "1 2\nregen 1 x\n": "not a readable .vec file",
        "1 2\nregen 1 nan\n": "expected 2 finite numbers",
        "1 99999\nregen 1\n": "width 99999",
        "1 2\nfremd 1 2\n": "has none of the 1 pseudo-glosses",
    }
    for content, message in contents.items():
        vec.write_text(content)
        with pytest.raises(InputError, match=message) as refused:
            published_vectors(vec, ["regen"])
        assert "\n" not in str(refused.value)
    cases = [
        (fasttext_model(tmp_path / "v.bin", version=11), "expected a fastText model of version 12"),
        (fasttext_model(tmp_path / "q.bin", pruned=3), "quantised"),
        (fasttext_model(tmp_path / "c.bin", cut=8), "cut short"),
        (fasttext_model(tmp_path / "d.bin", cut=430), "not a readable fastText model"),
        (tmp_path / "none.bin", "not a readable fastText model"),
        (tmp_path / "a.txt", "expected fastText vectors, .vec or .bin"),
    ]
    for path, message in cases:
        with pytest.raises(InputError, match=message):
            published_vectors(path, ["regen"])


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sltscale.config import DataSettings, SyntheticSettings
    from sltscale.data.synthetic.demo import ensure_synthetic_shards

    folder = tmp_path_factory.mktemp("lexicon") / "shards"
    synthetic = SyntheticSettings(clips=24, seed=1)
    ensure_synthetic_shards(
        DataSettings(shards=str(folder), synthetic=synthetic, frame_size=32, crop_size=28, global_batch=4)
    )
    return folder


def test_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sltscale.data.shards.index import open_index

    command = ["lexicon", "build", "--shards", str(shards), "--tagger", "words", "--width", "8"]
    assert cli.main([*command, "--out", str(tmp_path / "a")]) == 0
    assert "pseudo-glosses in" in capsys.readouterr().out
    lexicon = load_lexicon(tmp_path / "a")
    train, test = (open_index(shards, split).texts() for split in ("train", "test"))
    lexicon.check_covers(train, "a")
    assert lexicon.vectors.shape == (len(lexicon), 8)
    assert set(lexicon.glosses) == {word for text in train for word in text.split()}
    assert not set(test) - set(train) & set(lexicon.of_sentence)  # dev and test stay out of it
    assert json.loads((tmp_path / "a" / "lexicon.json").read_text())["tagger"] == "words"

    assert cli.main([*command, "--with-dev-and-test", "--out", str(tmp_path / "b")]) == 0
    assert set(load_lexicon(tmp_path / "b").of_sentence) >= {*train, *test}
    assert cli.main([*command, "--language", "fr", "--out", str(tmp_path / "c")]) == 2
    assert "there is no language 'fr'; the shards hold de" in capsys.readouterr().err
