"""BLEURT by a tiny BERT, saved as the published checkpoints are, against that model asked by hand, pair by pair."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from tiny_recipes import write_recipes
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from sltscale.cli import main
from sltscale.data.shards.index import Row, Shard, open_index, write_index
from sltscale.data.text import build_corpus_tokenizer
from sltscale.data.video.encoding import SourceFrame, encode
from sltscale.errors import InputError
from sltscale.evaluation.bleurt import BATCH, Bleurt, load_bleurt
from sltscale.methods import export
from sltscale.preflight import check_bleurt, check_stages, plan_stages
from sltscale.recipe_files import load_recipe, recipe_chain

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "home", "rain", "tonight", "a", "big"]
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
POSITIONS = 24
CPU = torch.device("cpu")


def save(folder: Path, *, outputs: int = 1, seed: int = 0, lower: bool = True) -> Path:
    """config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        max_position_embeddings=POSITIONS,
        num_labels=outputs,
        initializer_range=0.5,  # so that pairs differ by much
        **sizes,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(vocab=VOCABULARY, do_lower_case=lower).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("published") / "bleurt-tiny-24")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    """(hypotheses, references) of 1 to 9 words, in no order of length."""
    words = np.random.default_rng(3)
    drawn = [" ".join(words.choice(WORDS, words.integers(1, 10))) for _ in range(2 * (2 * BATCH + 5))]
    return drawn[::2], drawn[1::2]


@functools.cache
def published(folder: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(folder).eval()


def by_hand(folder: Path, hypothesis: list[str], reference: list[str]) -> float:
    pieces = ["[CLS]", *reference, "[SEP]", *hypothesis, "[SEP]"]
    segments = [0] * (len(reference) + 2) + [1] * (len(hypothesis) + 1)
    with torch.no_grad():
        ids = torch.tensor([[VOCABULARY[piece] for piece in pieces]])
        logits = published(folder)(ids, token_type_ids=torch.tensor([segments])).logits
    assert logits.shape == (1, 1)
    return float(logits)


def test_a_score_is_the_models_answer_to_the_pair(checkpoint: Path, pairs: tuple[list[str], list[str]]) -> None:
    bleurt = Bleurt(str(checkpoint))
    each, truncated = bleurt.score_each(*pairs, CPU)
    expected = [by_hand(checkpoint, ours.split(), theirs.split()) for ours, theirs in zip(*pairs, strict=True)]
    assert each == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.01
    assert truncated == 0
    found = bleurt.score(*pairs, CPU)
    assert found.value == pytest.approx(100 * np.mean(expected), abs=1e-3)
    assert found.truncated == 0
    # The reference comes first: the other way round is another question.
    assert abs(np.subtract(bleurt.score_each(*pairs[::-1], CPU)[0], expected)).max() > 0.01


def test_batched_equals_one_by_one(checkpoint: Path, pairs: tuple[list[str], list[str]]) -> None:
    bleurt = Bleurt(str(checkpoint))
    together, _ = bleurt.score_each(*pairs, CPU)
    alone = [bleurt.score_each([ours], [theirs], CPU)[0][0] for ours, theirs in zip(*pairs, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_tokenizer_that_pads_on_the_left(copy: Path, checkpoint: Path, pairs: tuple[list[str], list[str]]) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    expected, _ = Bleurt(str(checkpoint)).score_each(*pairs, CPU)
    assert Bleurt(str(copy)).score_each(*pairs, CPU)[0] == pytest.approx(expected, abs=1e-5)


def test_an_empty_hypothesis_is_asked_for_too(checkpoint: Path) -> None:
    each, _ = Bleurt(str(checkpoint)).score_each(["", " \n", "the cat"], ["the dog ran", "rain", "the cat"], CPU)
    expected = [by_hand(checkpoint, [], ["the", "dog", "ran"]), by_hand(checkpoint, [], ["rain"])]
    assert each[:2] == pytest.approx(expected, abs=1e-5)


def test_texts_are_read_as_they_are_written_to_files(checkpoint: Path, tmp_path: Path) -> None:
    bleurt = Bleurt(str(checkpoint))
    plain, _ = bleurt.score_each(["the cat"], ["a big dog"], CPU)
    assert bleurt.score_each(["The\n CAT "], ["a big\x00dog"], CPU)[0] == plain
    cased = Bleurt(str(save(tmp_path / "cased", lower=False)))
    assert cased.score_each(["the cat"], ["a big dog"], CPU)[0] == plain
    assert cased.score_each(["the CAT"], ["a big dog"], CPU)[0] != plain


def test_pairs_that_are_too_long_are_cut_and_counted(checkpoint: Path) -> None:
    bleurt = Bleurt(str(checkpoint))
    long, short = WORDS * 3, ["the", "dog", "ran", "home", "tonight"]
    each, truncated = bleurt.score_each([" ".join(short)] * 2, [" ".join(long), "rain"], CPU)
    kept = long[: POSITIONS - 3 - len(short)]  # the longer of the two loses its end
    assert each[0] == pytest.approx(by_hand(checkpoint, short, kept), abs=1e-5)
    assert truncated == 1
    assert bleurt.score_each([" ".join(short)], [" ".join(kept)], CPU)[1] == 0


def test_the_signature_names_the_checkpoint(
    checkpoint: Path, copy: Path, pairs: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    found = Bleurt(str(checkpoint)).score(*pairs, CPU)
    assert found == Bleurt(str(checkpoint)).score(*pairs, CPU)
    name, digest, *how = found.signature.split("|")
    assert (name, how) == ("bleurt-tiny-24", ["tokens:24", "mean:sentences", "times:100"])
    assert Bleurt(str(copy)).score(*pairs, CPU).signature.split("|")[:2] == ["copy", digest]
    other = Bleurt(str(save(tmp_path / "bleurt-tiny-24", seed=1))).score(*pairs, CPU)
    assert other.signature.split("|")[0] == name
    assert other.signature.split("|")[1] != digest
    assert other.value != found.value


def changed(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def without_the_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_a_larger_vocabulary(folder: Path) -> None:
    BertTokenizer(vocab=VOCABULARY | {"more": len(VOCABULARY)}).save_pretrained(folder)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"cannot be loaded .*; expected a folder or hub name of a BERT with one output"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"cannot be loaded .*config.json and model.safetensors",
    ),
    "damaged weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
    "three outputs": (lambda folder: save(folder, outputs=3), "has 3 outputs; expected .* one output"),
    "not trained to score": (without_the_head, "lack 1 of the weights .* classifier.weight"),
    "code of its own": (
        changed("config.json", model_type="bleurt"),
        "is of model type bleurt, an architecture outside of transformers, as BLEURT-20's .* such as Elron/bleurt-base",
    ),
    "another task": (changed("config.json", model_type="resnet"), "cannot be loaded|has a tokenizer of"),
    "no tokenizer": (
        lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
        "has a tokenizer of 5 tokens and a model of 17",
    ),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer of .* cannot be loa"),
    "another's tokenizer": (with_a_larger_vocabulary, "has a tokenizer of 18 tokens and a model of 17"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_loaded(fault: str, copy: Path) -> None:
    spoil, message = REFUSED[fault]
    spoil(copy)
    with pytest.raises(InputError, match=message) as error:
        Bleurt(str(copy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], ["a", "b"])])
def test_unequal_numbers(checkpoint: Path, hypotheses: list[str], references: list[str]) -> None:
    with pytest.raises(InputError, match=r"hypotheses and .* references"):
        Bleurt(str(checkpoint)).score(hypotheses, references, CPU)


def share(rank: int, meeting: str, checkpoint: Path, pairs: tuple[list[str], list[str]], out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
    found = load_bleurt(str(checkpoint)).score(*pairs, CPU)
    Path(f"{out}{rank}").write_text(json.dumps([found.value, found.truncated, found.signature]))
    dist.destroy_process_group()


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("count", [69, 2])
def test_ranks_share_the_pairs(
    count: int, checkpoint: Path, pairs: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    """Also where there are fewer than ranks."""
    pairs = pairs[0][:count], pairs[1][:count]
    given = (str(tmp_path / "meeting"), checkpoint, pairs, str(tmp_path / "rank"))
    torch.multiprocessing.spawn(share, given, nprocs=3)
    alone = Bleurt(str(checkpoint)).score(*pairs, CPU)
    for rank in range(3):
        value, truncated, signature = json.loads((tmp_path / f"rank{rank}").read_text())
        assert (truncated, signature) == (alone.truncated, alone.signature)
        assert value == pytest.approx(alone.value, abs=1e-4)


def test_what_is_refused_before_training_starts(checkpoint: Path, tmp_path: Path) -> None:
    recipe = str(write_recipes(tmp_path, tmp_path / "shards").translate)

    def check(*overrides: str) -> None:
        always = ("--start", "none", "--evaluation.every_epochs", "1")
        stages = plan_stages(recipe_chain(recipe, [*always, *overrides], tmp_path / "run"))
        check_stages(stages)
        check_bleurt(stages)

    check("--evaluation.bleurt", str(checkpoint), "--train.keep_best.score", "bleurt")
    with pytest.raises(InputError, match=r'keep_best\.score "bleurt" needs evaluation\.bleurt; set both'):
        check("--train.keep_best.score", "bleurt")
    with pytest.raises(InputError, match=r"keep_best\.score 'bleurd'; did you mean bleurt"):
        check("--train.keep_best.score", "bleurd", "--evaluation.bleurt", str(checkpoint))
    with pytest.raises(InputError, match=r"evaluation\.bleurt '.*nowhere' cannot be loaded"):
        check("--evaluation.bleurt", str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def write_shards(folder: Path, sentences: list[str]) -> None:
    """A test split of one clip a sentence, 8 frames each."""
    folder.mkdir()
    content, rows = b"", []
    for number, text in enumerate(sentences):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
        pictures = coarse.repeat(4, 1).repeat(4, 2)
        clip = encode([SourceFrame(picture, pts, 1, Fraction(1, 25)) for pts, picture in enumerate(pictures)]).data
        place = (len(content), len(content) + len(clip))
        rows.append(
            Row(
                id=f"clip-{number}",
                key=f"clip-{number}",
                text=text,
                language="en",
                frames=8,
                fps=(25, 1),
                offset=place[0],
                size=len(clip),
                sha256=hashlib.sha256(clip).hexdigest(),
                record=place,
                crc32=(0, 0, 0),
            )
        )
        content += clip
    (folder / "test-0.tar").write_bytes(content)
    write_index(folder, "test", [Shard("test-0.tar", len(content), "", rows)], corpus="test", frame_size=32)


@pytest.mark.parametrize("place", ["recipe", "option"])
def test_the_command_writes_the_score(
    place: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = ["the cat sat on the mat", "a big dog ran home", "rain tonight"]
    write_shards(tmp_path / "shards", sentences)
    wanted = ["--evaluation.bleurt", str(checkpoint)] if place == "recipe" else []
    recipe = load_recipe(
        str(write_recipes(tmp_path, tmp_path / "shards").translate), ["--start", "none", "--data.workers", "0", *wanted]
    )
    tokenizer = build_corpus_tokenizer(sentences * 5, ["en"], 60)
    run = tmp_path / "run"
    torch.manual_seed(1)
    export.save_export(run / "export", recipe, export.tensors(export.build(recipe, tokenizer)), tokenizer)
    (run / "config.json").write_text(recipe.to_json())

    def evaluate(out: str, *more: str) -> int:
        arguments = ["evaluate", "--run", str(run), "--shards", str(tmp_path / "shards"), "--out", str(tmp_path / out)]
        return main([*arguments, *more])

    assert evaluate("out", *([] if wanted else ["--bleurt", str(checkpoint)])) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    rows = [line.split("\t") for line in (tmp_path / "out/hypotheses.tsv").read_text().splitlines()[1:]]
    assert [row[1] for row in rows] == open_index(tmp_path / "shards", "test").texts() == sentences
    expected = Bleurt(str(checkpoint)).score([row[2] for row in rows], sentences, CPU)
    assert metrics["bleurt"] == pytest.approx(expected.value, abs=1e-9)
    assert (metrics["signature"]["bleurt"], metrics["bleurt_truncated"]) == (expected.signature, expected.truncated)
    assert f"{metrics['bleurt']:.4f}" in capsys.readouterr().out

    assert evaluate("refused", "--bleurt", str(tmp_path / "nowhere")) == 2
    assert "nowhere' cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "refused/metrics.json").exists()
    assert evaluate("plain", "--bleurt", "none") == 0
    assert not any("bleurt" in key for key in json.loads((tmp_path / "plain/metrics.json").read_text()))
