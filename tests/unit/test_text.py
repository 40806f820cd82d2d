import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sltscale.data.text import TextTokenizer, build_corpus_tokenizer, load_tokenizer
from sltscale.errors import InputError

SENTENCES = [
    "übermorgen wird es im süden wärmer",
    "in der nacht zwölf grad an der küste",
    "Straße, Fuß & Maß: 10 % mehr!",
    "am tag scheint die sonne",
    "die  sonne   scheint \u201eoft\u201c",
    "die sonne scheint",
    "今天天气很好，明天下雨。",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return build_corpus_tokenizer(SENTENCES, ["de", "zh-Hans"], 120)


def test_ids_stand_in_mbart_order(tokenizer: TextTokenizer) -> None:
    vocabulary = tokenizer.backend.get_vocab()
    assert [vocabulary[token] for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    last = tokenizer.size - 1
    assert [vocabulary[token] for token in ("de_DE", "zh_CN", "<mask>")] == [last - 2, last - 1, last]
    assert sorted(vocabulary.values()) == list(range(tokenizer.size))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.language_id("de-CH")) == (1, 2, last - 2)
    assert tokenizer.size <= 4 + 120 + 3


def test_layout_of_a_target(tokenizer: TextTokenizer) -> None:
    batch = tokenizer.encode(["die sonne", "die sonne scheint oft", ""], ["de", "de", "zh"])
    short, long, empty = batch.input_ids.tolist()
    n = int(batch.attention_mask[0].sum())
    assert short[n - 2 :] == [2, tokenizer.language_id("de")] + [1] * (len(short) - n)
    assert long[-2:] == [2, tokenizer.language_id("de")]
    assert empty[:3] == [2, tokenizer.language_id("zh"), 1]
    assert torch.equal(batch.attention_mask, (batch.input_ids != 1).long())
    assert batch.input_ids.dtype == torch.int64
    assert tokenizer.decode(batch.input_ids) == ["die sonne", "die sonne scheint oft", ""]


def test_training_sentences_come_back_exactly(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(SENTENCES, ["de"] * len(SENTENCES)).input_ids) == SENTENCES


# Special tokens spelt out in a text ("<s>", "de_DE") are read as such, hence no "<" and "_".
words = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="<_\u2581"), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(words, min_size=1, max_size=5).map(" ".join), min_size=1, max_size=5))
def test_any_corpus_comes_back_exactly(sentences: list[str]) -> None:
    tokenizer = build_corpus_tokenizer(sentences, ["en"], 400)
    assert tokenizer.decode(tokenizer.encode(sentences, ["en"] * len(sentences)).input_ids) == sentences


def test_frequent_words_become_pieces() -> None:
    tokenizer = build_corpus_tokenizer(["the wind blows", "the rain falls", "the sun and the wind"] * 50, ["en"], 60)
    assert tokenizer.backend.tokenize("the wind") == ["▁the", "▁wind"]


def test_long_sentences_are_cut_counted_and_keep_their_end(tokenizer: TextTokenizer) -> None:
    cut = TextTokenizer(tokenizer.backend, max_tokens=5)
    rows = cut.encode(["die sonne scheint oft in der nacht", "die"], ["de", "de"]).input_ids
    assert rows.shape == (2, 5)
    assert rows[0, 3:].tolist() == [2, cut.language_id("de")]
    assert (
        rows[0, :3].tolist()
        == tokenizer.encode(["die sonne scheint oft in der nacht"], ["de"]).input_ids[0, :3].tolist()
    )
    assert cut.count_truncated(["die sonne scheint oft in der nacht", "die"]) == 1


def test_decoding_leaves_special_tokens_out(tokenizer: TextTokenizer) -> None:
    sonne = tokenizer.backend.encode("sonne", add_special_tokens=False)
    row = [tokenizer.language_id("de"), 0, *sonne, 3, 2, tokenizer.language_id("zh"), 1, tokenizer.size - 1]
    assert tokenizer.decode([row, [1, 1]]) == ["sonne", ""]


def test_unknown_characters_become_unk(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode(["die ж"], ["de"]).input_ids[0].tolist()
    assert 3 in ids
    assert tokenizer.decode([ids]) == ["die"]


def test_saved_tokenizers_load_the_same(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path, max_tokens=64)
    languages = ["de"] * len(SENTENCES)
    assert torch.equal(loaded.encode(SENTENCES, languages).input_ids, tokenizer.encode(SENTENCES, languages).input_ids)
    assert loaded.decode(tokenizer.encode(SENTENCES, languages).input_ids) == SENTENCES
    assert (loaded.size, loaded.pad_id, loaded.max_tokens) == (tokenizer.size, tokenizer.pad_id, 64)


BUILD = """
import sys
from sltscale.data.text import build_corpus_tokenizer
lines = open(sys.argv[1], encoding="utf-8").read().splitlines()
build_corpus_tokenizer(lines[:: int(sys.argv[3])], {"de", "en", "zh"}, 300).save(sys.argv[2])
"""


def test_same_sentences_same_bytes_in_any_process_and_order(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    words = [f"{stem}{end}" for stem in ("regn", "wolk", "stürm", "sonn", "weh") for end in ("en", "t", "ig", "e", "")]
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 8)) for i in range(200)]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    digests = set()
    for hash_seed, order in (("1", "1"), ("2", "-1")):
        folder = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", BUILD, corpus, folder, order], env=environment, check=True, timeout=600)
        files = sorted(folder.iterdir())
        digests.add(tuple((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files))
    assert len(digests) == 1


def test_what_cannot_be_built_or_loaded(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training sentences"):
        build_corpus_tokenizer([" ", ""], ["de"], 100)
    with pytest.raises(InputError, match=r"without an mBART code: xx;.*de"):
        build_corpus_tokenizer(["a"], ["xx"], 100)
    with pytest.raises(InputError, match=r"text\.vocabulary is 3, but the sentences have 4"):
        build_corpus_tokenizer(["a b c"], ["de"], 3)
    with pytest.raises(InputError, match=r"no code for language 'fr'; it knows: de, zh"):
        tokenizer.encode(["bon"], ["fr"])
    with pytest.raises(InputError, match="max_tokens is 2"):
        TextTokenizer(tokenizer.backend, max_tokens=2)
    with pytest.raises(
        InputError, match=r"(?s)^tokenizer '[^\n]*missing' cannot be loaded [^\n]*tokenizer\.json[^\n]*$"
    ):
        load_tokenizer(tmp_path / "missing")


# --- prompts in place of language codes -----------------------------------------------------------------------------

PROMPTS = {"zh": "中文:", "de": "Übersetze ins Deutsche:"}


def save_byte_level(folder: Path) -> None:
    """A byte-level BPE tokenizer, as GPT-2's and Qwen's, with an end token and no other special one."""
    special = {"eos_token": "<|end|>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*special.values()], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def test_a_tokenizer_without_padding_and_codes(tmp_path: Path) -> None:
    save_byte_level(tmp_path / "hub")
    tokenizer = load_tokenizer(tmp_path / "hub", 64, PROMPTS)
    assert tokenizer.languages == ["de", "zh"]
    assert tokenizer.pad_id == tokenizer.eos_id == 0
    assert tokenizer.size == 300
    assert (tokenizer.language_id("de-CH"), tokenizer.language_id("zh")) == (300, 301)
    assert [tokenizer.backend.decode(prompt) for prompt in tokenizer.prompts] == [PROMPTS["de"], PROMPTS["zh"]]
    batch = tokenizer.encode([SENTENCES[0], "so", ""], ["de", "de", "zh"])
    lengths = batch.attention_mask.sum(1).tolist()
    assert lengths[2] == 2
    for row, (length, language) in enumerate(zip(lengths, [300, 300, 301], strict=True)):
        assert batch.input_ids[row, length - 2 :].tolist() == [0, language] + [0] * (max(lengths) - length)
    assert batch.language_ids().tolist() == [300, 300, 301]
    ids, mask = batch.without_language(tokenizer.pad_id)
    assert ids.max() < 300 and mask.sum(1).tolist() == [length - 1 for length in lengths]
    assert tokenizer.decode(ids) == [SENTENCES[0], "so", ""]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved", 64, PROMPTS)
    assert torch.equal(
        again.encode(SENTENCES, ["de"] * len(SENTENCES)).input_ids,
        tokenizer.encode(SENTENCES, ["de"] * len(SENTENCES)).input_ids,
    )
    assert (again.size, again.pad_id, again.prompts) == (tokenizer.size, tokenizer.pad_id, tokenizer.prompts)


def test_what_a_tokenizer_puts_in_front(tmp_path: Path) -> None:
    save_byte_level(tmp_path / "without")
    assert load_tokenizer(tmp_path / "without", 64, PROMPTS).start == ()
    backend = PreTrainedTokenizerFast.from_pretrained(tmp_path / "without")
    backend.add_special_tokens({"bos_token": "<bos>"})
    bos, eos = (int(found) for found in (backend.bos_token_id, backend.eos_token_id))
    for template, start in (("<bos> $A", (bos,)), ("<bos> $A {eos}", (bos,)), ("$A {eos}", ())):
        single = template.format(eos=backend.eos_token)
        known = [("<bos>", bos), (backend.eos_token, eos)]
        backend.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
        backend.save_pretrained(tmp_path / "with")
        assert load_tokenizer(tmp_path / "with", 64, PROMPTS).start == start


def test_a_language_without_a_prompt_and_no_language_told(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    prompted = TextTokenizer(tokenizer.backend, 64, PROMPTS)
    with pytest.raises(InputError, match=r"no prompt for language 'fr', only for: de, zh; give one as method") as found:
        prompted.encode(["bon"], ["fr"])
    assert "\n" not in str(found.value)
    assert prompted.pad_id == 1  # its own
    assert prompted.decode(tokenizer.encode(["die sonne"], ["de"]).input_ids) == ["die sonne"]  # a code is no text
    untold = TextTokenizer(tokenizer.backend, 64, {})
    assert (untold.languages, untold.prompts) == ([], ())
    assert untold.encode(["die sonne"], ["fr"]).input_ids[0, -2:].tolist() == [2, untold.size]
    save_byte_level(tmp_path)
    with pytest.raises(InputError, match="no padding or no end-of-sentence token"):
        load_tokenizer(tmp_path)
