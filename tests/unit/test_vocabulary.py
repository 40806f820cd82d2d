"""Vocabularies cut to a corpus: the same pieces, the same ids' order, the same logits."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from mbart_files import CODES, OTHER_TEXT, train_sentencepiece, write_model, write_tokenizer_json
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from sltscale.cli import main
from sltscale.data.annotations.labels import read_labels
from sltscale.data.text import FIRST, LAST, load_tokenizer
from sltscale.data.vocabulary import trim
from sltscale.errors import InputError

REAL = Path(__file__).parents[3] / "shared" / "annotations" / "phoenix2014t"
SENTENCES = [
    "und nun die wettervorhersage für morgen donnerstag den zwölften august",
    "mancherorts regnet es auch länger und ergiebig",
    "am tag scheint im süden die sonne, im norden regen",
    "auf den bergen 10 °C",
    "明天有雨，后天晴。",
] * 4


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizer.json", "both"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mBART folder with the tokenizer in one form, the other, or both as on the hub."""
    folder = tmp_path_factory.mktemp("published")
    train_sentencepiece(folder, [*SENTENCES, *OTHER_TEXT * 3], 420)
    write_tokenizer_json(folder)
    write_model(folder, len(AutoTokenizer.from_pretrained(folder)))
    if request.param == "sentencepiece":
        (folder / "tokenizer.json").unlink()
    if request.param == "tokenizer.json":
        (folder / "sentencepiece.bpe.model").unlink()
    return folder


def plain_ids(folder: Path, sentences: list[str]) -> list[list[int]]:
    """By the tokenizers library alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in sentences]


def check_order(folder: Path) -> list[int]:
    """mBART's: <s> <pad> </s> <unk>, pieces as they followed each other, language codes, <mask>. -> the original ids"""
    vocabulary = load_tokenizer(folder).backend.get_vocab()
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    assert sorted(vocabulary.values()) == list(range(len(tokens)))
    assert tokens[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokens[-26:] == [*CODES, "<mask>"]
    kept: list[int] = json.loads((folder / "kept_ids.json").read_text())
    assert kept == sorted(set(kept))
    assert len(kept) == len(tokens)
    return kept


def same_logits(full: MBartForConditionalGeneration, out: Path, kept: list[int]) -> float:
    """Greatest difference on the kept ids, for inputs and targets of kept ids."""
    cut, report = MBartForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert cut.config.vocab_size == len(kept)
    torch.manual_seed(0)
    inputs, targets = (torch.randint(4, len(kept), (3, 9)) for _ in range(2))
    choice = torch.tensor(kept)
    with torch.no_grad():
        ours = cut.eval()(input_ids=inputs, decoder_input_ids=targets).logits
        theirs = full.eval()(input_ids=choice[inputs], decoder_input_ids=choice[targets]).logits[..., choice]
    assert theirs.std() > 1e-4
    return float((ours - theirs).abs().max())


def test_a_small_corpus(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "trimmed"
    lines = trim(str(published), SENTENCES, out, published)
    kept = check_order(out)
    full = load_tokenizer(published)
    assert f"{len(kept)} of {full.size} token ids are left; 5 different sentences are split as before" in lines
    assert len(kept) < full.size - 50
    trimmed = load_tokenizer(out)
    for text in SENTENCES:
        assert trimmed.backend.tokenize(text) == full.backend.tokenize(text)
    if (published / "tokenizer.json").is_file():
        ids = plain_ids(published, SENTENCES)
        assert [[kept[i] for i in row] for row in plain_ids(out, SENTENCES)] == ids
        assert {i for row in ids for i in row} | {0, 1, 2, 3, *kept[-26:]} == {*kept}
    if (published / "sentencepiece.bpe.model").is_file():
        before, after = (
            sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
            for folder in (published, out)
        )
        assert [after.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
        assert after.get_piece_size() == len(kept) - 1 - 26  # all but <pad>, codes and mask
        for text in SENTENCES:
            assert after.encode(text, out_type=str) == before.encode(text, out_type=str)
            assert trimmed.backend.tokenize(text) == before.encode(text, out_type=str)
    assert not list(tmp_path.glob(".*"))
    full_model = MBartForConditionalGeneration.from_pretrained(published)
    assert same_logits(full_model, out, kept) < 1e-6
    assert trimmed.language_id("de") == len(kept) - 1 - len(CODES) + CODES.index("de_DE")
    # words of another subject are spelt in what is left, or unknown; nothing fails
    assert trimmed.encode(OTHER_TEXT, ["de"] * 5).input_ids.max() < len(kept)


def test_text_is_normalised_as_in_training(published: Path) -> None:
    """transformers' own class leaves that out, and what is not in the vocabulary as it stands is lost."""
    tokenizer = load_tokenizer(published)
    assert tokenizer.decode(tokenizer.encode(["ｍｏｒｇｅｎ  ﬁ"], ["de"]).input_ids) == ["morgen fi"]
    assert tokenizer.languages == sorted(code.split("_")[0] for code in CODES)


def test_every_phoenix_sentence(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip("real annotations are not beside the repository (shared/annotations)")
    sentences = [row["text"] for row in read_labels(REAL / "labels.train").values()]
    assert len(sentences) == 7096
    folder, out = tmp_path / "full", tmp_path / "trimmed"
    # half of the model's vocabulary is of other texts: sentences turned round
    train_sentencepiece(folder, [*sentences, *(text[::-1] for text in sentences[::3])], 4000)
    write_tokenizer_json(folder)
    full_model = write_model(folder, len(AutoTokenizer.from_pretrained(folder)))
    trim(str(folder), sentences, out, folder)
    kept = check_order(out)
    assert len(kept) < full_model.config.vocab_size - 1000
    before, after = (
        sentencepiece.SentencePieceProcessor(model_file=str(place / "sentencepiece.bpe.model"))
        for place in (folder, out)
    )
    pieces = before.encode(sentences, out_type=str)
    assert after.encode(sentences, out_type=str) == pieces
    ids, old = plain_ids(out, sentences), plain_ids(folder, sentences)
    assert [[kept[i] for i in row] for row in ids] == old
    assert {i for row in ids for i in row} | {0, 1, 2, 3, *range(len(kept) - 26, len(kept))} == {*range(len(kept))}
    trimmed = load_tokenizer(out)
    assert [trimmed.backend.tokenize(text) for text in sentences] == pieces
    assert trimmed.decode(trimmed.encode(sentences, ["de"] * len(sentences)).input_ids) == [
        " ".join(text.split()) for text in sentences
    ]
    assert same_logits(full_model, out, kept) < 1e-6


def write_unigram(folder: Path, pieces: dict[str, float]) -> None:
    first = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = Tokenizer(models.Unigram([*first, *pieces.items()], unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"additional_special_tokens": ["de_DE"], **FIRST, **LAST}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def test_what_is_unknown_stays_as_dear_as_it_was(tmp_path: Path) -> None:
    # xyz is xy z (-80), since x alone costs 100. Without x it would be unknown for 10 more than the worst, 50, and
    # ▁ <unk> yz (-52) would win.
    write_unigram(tmp_path / "full", {"▁": -1, "x": -100, "xy": -40, "z": -40, "yz": -1, "a": -2, "b": -2})
    before = load_tokenizer(tmp_path / "full").backend.tokenize("xyz ayz")
    assert before == ["▁", "xy", "z", "▁", "a", "yz"]
    trim(str(tmp_path / "full"), ["xyz ayz"], tmp_path / "out")
    trimmed = load_tokenizer(tmp_path / "out")
    assert trimmed.backend.tokenize("xyz ayz") == before
    assert {"x", "b"} & set(trimmed.backend.get_vocab()) == {"x"}


def test_mt5(tmp_path: Path) -> None:
    """Other special ids, an output layer of its own, and more rows than ids."""
    folder, out = tmp_path / "mt5", tmp_path / "out"
    folder.mkdir()
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scored += [
        (piece, -3.0 - 0.1 * i) for i, piece in enumerate(["▁regen", "▁sonne", "▁im", "▁wind", "reg", "en", "s"])
    ]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "pad_token": "<pad>", "eos_token": "</s>"})
    )
    full = MT5ForConditionalGeneration(MT5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    full.save_pretrained(folder)
    # Published files hold an output layer of its own, which transformers 5.23 takes if it differs.
    weights = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.randn(16, 8)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    full = MT5ForConditionalGeneration.from_pretrained(folder).eval()
    assert torch.equal(full.lm_head.weight, weights["lm_head.weight"])
    trim(str(folder), ["regen im wind"], out, folder)
    kept = json.loads((out / "kept_ids.json").read_text())
    tokens = load_tokenizer(folder).backend.convert_ids_to_tokens(kept)
    assert tokens == ["<pad>", "</s>", "<unk>", "▁regen", "▁im", "▁wind"]
    assert load_tokenizer(out).backend.get_vocab() == {token: i for i, token in enumerate(tokens)}
    cut = MT5ForConditionalGeneration.from_pretrained(out).eval()
    inputs, targets, choice = torch.tensor([[3, 4, 5, 1]]), torch.tensor([[0, 5, 3]]), torch.tensor(kept)
    with torch.no_grad():
        ours = cut(input_ids=inputs, decoder_input_ids=targets).logits
        theirs = full(input_ids=choice[inputs], decoder_input_ids=choice[targets]).logits[..., choice]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_pieces_that_are_no_text_stay(tmp_path: Path) -> None:
    """What the sentencepiece model marks with a type: here the bytes that unknown characters are spelt in."""
    file = train_sentencepiece(tmp_path / "full", [*SENTENCES, *OTHER_TEXT * 3], 420, byte_fallback=True)
    (tmp_path / "full/config.json").write_text(json.dumps({"model_type": "mbart"}))
    write_tokenizer_json(tmp_path / "full")
    trim(str(tmp_path / "full"), SENTENCES[:1], tmp_path / "out")
    after = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / file.name))
    assert sum(after.is_byte(i) for i in range(after.get_piece_size())) == 256
    vocabulary = load_tokenizer(tmp_path / "out").backend.get_vocab()
    pieces = [after.id_to_piece(i) for i in range(after.get_piece_size())]
    assert set(vocabulary) == {*pieces, "<pad>", "<mask>", *CODES}
    assert [vocabulary[piece] for piece in pieces[3:]] == list(range(4, len(pieces) + 1))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    write_unigram(folder, {"▁": -1, "▁regen": -2, "▁sonne": -2})
    write_model(folder, 9)
    return folder


def test_weights_in_several_files_and_ids_in_the_configuration(small: Path, tmp_path: Path) -> None:
    weights = load_file(small / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, small / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (small / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((small / "config.json").read_text())
    config["task_specific_params"] = {"translation": {"decoder_start_token_id": 7}}
    (small / "config.json").write_text(json.dumps(config))
    (small / "model.safetensors").unlink()
    trim(str(small), ["regen"], tmp_path / "out", small)
    kept = json.loads((tmp_path / "out/kept_ids.json").read_text())
    assert kept == [0, 1, 2, 3, 5, 7, 8]
    cut = json.loads((tmp_path / "out/config.json").read_text())
    assert cut["task_specific_params"]["translation"]["decoder_start_token_id"] == 5
    assert (cut["vocab_size"], cut["pad_token_id"], cut["eos_token_id"]) == (7, 1, 2)
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == weights.keys()
    for name, tensor in weights.items():
        if "shared" in name or "lm_head" in name:
            tensor = tensor[kept]
        if "final_logits_bias" in name:
            tensor = tensor[:, kept]
        assert torch.equal(ours[name], tensor), name


def test_the_command(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_text("regen\n\nregen sonne\n", encoding="utf-8")
    arguments = [
        "vocab",
        "trim",
        str(small),
        "--sentences",
        str(tmp_path / "lines.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--model", str(small)]) == 0
    assert "8 of 9 token ids are left; 2 different sentences are split as before" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").is_file()
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'out'} is not empty")
    arguments[4] = str(tmp_path / "absent.txt")
    assert main(arguments) == 2
    assert "expected sentences, one a line" in capsys.readouterr().err


def test_bad_input(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no sentences"):
        trim(str(small), [" ", ""], out)
    with pytest.raises(InputError, match=r"vocab_size is 8, the tokenizer has 9 ids"):
        other = tmp_path / "other"
        write_model(other, 8)
        trim(str(small), ["regen"], out, other)
    with pytest.raises(InputError, match=r"holds pytorch_model.bin; expected model.safetensors"):
        shutil.copytree(small, tmp_path / "pickled")
        (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
        trim(str(small), ["regen"], out, tmp_path / "pickled")
    with pytest.raises(InputError, match=r"holds no config.json"):
        trim(str(small), ["regen"], out, tmp_path)
    with pytest.raises(InputError, match="is a BPE model; only sentencepiece's unigram models"):
        bpe = Tokenizer(models.BPE({token: i for i, token in enumerate([*FIRST.values(), "a"])}, []))
        PreTrainedTokenizerFast(tokenizer_object=bpe, **FIRST).save_pretrained(tmp_path / "bpe")
        trim(str(tmp_path / "bpe"), ["a"], out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
