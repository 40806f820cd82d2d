"""Sentences to token ids and back: tokens, </s>, language id, padding on the right, which is mBART's target layout.

Letters: B sentences, L tokens of the longest. Ids of a tokenizer built here follow mBART's order (Liu et al. 2020):
<s>=0 <pad>=1 </s>=2 <unk>=3, pieces, language codes, <mask>.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, MBartTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from sltscale.errors import InputError
from sltscale.structures import TextBatch

# BCP-47 primary language subtag -> the language codes of mBART-cc25.
MBART_CODES = {
    "ar": "ar_AR",
    "cs": "cs_CZ",
    "de": "de_DE",
    "en": "en_XX",
    "es": "es_XX",
    "et": "et_EE",
    "fi": "fi_FI",
    "fr": "fr_XX",
    "gu": "gu_IN",
    "hi": "hi_IN",
    "it": "it_IT",
    "ja": "ja_XX",
    "kk": "kk_KZ",
    "ko": "ko_KR",
    "lt": "lt_LT",
    "lv": "lv_LV",
    "my": "my_MM",
    "ne": "ne_NP",
    "nl": "nl_XX",
    "ro": "ro_RO",
    "ru": "ru_RU",
    "si": "si_LK",
    "tr": "tr_TR",
    "vi": "vi_VN",
    "zh": "zh_CN",
}
FIRST = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
LAST = {"mask_token": "<mask>"}
SHORTEST = 3  # one token, </s>, language id


class TextTokenizer:
    """A transformers tokenizer, and the languages that a model is told by it.

    max_tokens: longest encoded sentence, </s> and language id included. prompts: how the model is told the language;
    none: by the tokenizer's code for it (mBART); texts by BCP-47 primary subtag: by that in front of the sentence, and
    other languages are not known; empty: not at all, and any will do. With prompts a language id is no token, but a
    number from ``size`` on; and a tokenizer without padding pads with </s>, which the mask keeps apart from a
    sentence's own.

    Raises InputError if the tokenizer has no end token, or with codes no padding token, or max_tokens leaves no room
    for text.
    """

    def __init__(
        self, backend: PreTrainedTokenizerBase, max_tokens: int = 128, prompts: Mapping[str, str] | None = None
    ) -> None:
        if backend.eos_token_id is None or (prompts is None and backend.pad_token_id is None):
            raise InputError("the tokenizer has no padding or no end-of-sentence token; expected one of mBART's kind")
        if max_tokens < SHORTEST:
            raise InputError(
                f"text.max_tokens is {max_tokens}; expected at least {SHORTEST}: text, </s>, language code"
            )
        self.backend = backend
        self.max_tokens = max_tokens
        vocabulary = backend.get_vocab()
        self.size = max(vocabulary.values()) + 1  # rows that an embedding needs
        codes = {language: vocabulary[code] for language, code in MBART_CODES.items() if code in vocabulary}
        self._told = prompts
        self._languages = codes if prompts is None else {name: self.size + i for i, name in enumerate(sorted(prompts))}
        self._special = {*backend.all_special_ids, *codes.values()}

    @property
    def pad_id(self) -> int:
        pad = self.backend.pad_token_id
        return self.eos_id if pad is None else int(pad)

    @property
    def eos_id(self) -> int:
        return int(self.backend.eos_token_id)

    @property
    def languages(self) -> list[str]:
        """BCP-47 codes of the languages it has a code or prompt for; empty where it does not matter."""
        return sorted(self._languages)

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the prompts, in the order of ``languages``; the first belongs to the language id ``size``."""
        told = [(self._told or {})[language] for language in self.languages] if self._told else []
        return tuple(tuple(self.backend.encode(prompt, add_special_tokens=False)) for prompt in told)

    @property
    def start(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of any text (Gemma's and Llama's begin-of-text token; of Qwen nothing)."""
        text = self.backend.encode("a", add_special_tokens=False)
        whole = self.backend.encode("a")
        found = (place for place in range(len(whole)) if whole[place : place + len(text)] == text)
        return tuple(whole[: next(found, 0)])

    def language_id(self, language: str) -> int:
        """Id of a BCP-47 language ("de", "en-US"); InputError names the known ones for any other."""
        if self._told is not None and not self._told:
            return self.size
        try:
            return self._languages[_primary(language)]
        except KeyError:
            known = ", ".join(sorted(self._languages)) or "none"
            if self._told is not None:
                raise InputError(
                    f"there is no prompt for language {language!r}, only for: {known}; give one as "
                    f"method.language_model.prompts"
                ) from None
            raise InputError(f"the tokenizer has no code for language {language!r}; it knows: {known}") from None

    def encode(self, texts: Sequence[str], languages: Sequence[str]) -> TextBatch:
        """Ids [B, L] of the texts; longer ones lose tokens at the end, never </s> and the language id."""
        if len(texts) != len(languages):
            raise ValueError(f"{len(texts)} texts but {len(languages)} languages")
        rows = []
        for text, language in zip(texts, languages, strict=True):
            tokens = self.backend.encode(text, add_special_tokens=False)
            rows.append([*tokens[: self.max_tokens - 2], self.eos_id, self.language_id(language)])
        input_ids = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        return TextBatch(input_ids, attention_mask)

    def count_truncated(self, texts: Iterable[str]) -> int:
        """How many of the texts ``encode`` would cut."""
        return sum(len(self.backend.encode(text, add_special_tokens=False)) > self.max_tokens - 2 for text in texts)

    def decode(self, ids: Sequence[Sequence[int]] | torch.Tensor) -> list[str]:
        """Text of each row without special ids (<unk> and language codes are such) and without space at its ends."""
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        texts = [[i for i in row if i not in self._special] for row in rows]
        return [self.backend.decode(text, clean_up_tokenization_spaces=False).strip() for text in texts]

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json, which ``load_tokenizer`` and transformers open."""
        self.backend.save_pretrained(folder)


def build_corpus_tokenizer(
    sentences: Iterable[str],
    languages: Iterable[str],
    vocabulary: int,
    max_tokens: int = 128,
    prompts: Mapping[str, str] | None = None,
) -> TextTokenizer:
    """A unigram model of at most ``vocabulary`` pieces learnt from the training sentences.

    Same sentences (in any order) and languages (BCP-47), same tokenizer.json byte for byte. Text is not normalised:
    decoding an encoded training sentence gives it back but for space at its ends (special tokens spelt out in a text,
    like "</s>", are read as such and lost). A small corpus yields fewer pieces.
    Raises InputError without sentences, for a language that mBART has no code for, and for more characters than pieces.
    """
    lines = sorted(line for sentence in sentences if (line := " ".join(sentence.splitlines()).strip()))
    if not lines:
        raise InputError("no training sentences to learn a tokenizer from; expected a split with texts")
    present = {_primary(language) for language in languages}
    if unknown := present - MBART_CODES.keys():
        raise InputError(
            f"languages without an mBART code: {', '.join(sorted(unknown))}; known: {', '.join(MBART_CODES)}"
        )
    codes = sorted(MBART_CODES[language] for language in present)
    # +1 for the mark that stands for a space; the trainer has to keep a piece for every character.
    needed = len(set("".join(lines)) - {" "}) + 1
    if vocabulary < needed:
        raise InputError(
            f"text.vocabulary is {vocabulary}, but the sentences have {needed} different characters; raise it"
        )
    # The trainer of the tokenizers library depends on its random hash seed (three runs, three models) and learns no
    # whole words that are part of no other; sentencepiece in one thread gives the same model every time.
    # Its candidates are repeated substrings in their longest form, which for a word that a space (or the end) always
    # follows takes that in and is no valid piece. Written twice, every word is followed by both, and counts stay in
    # proportion; pieces never cross a space anyway.
    words = (f"{word} {word}" for line in lines for word in line.split(" ") if word)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_writer=model,
        model_type="unigram",
        vocab_size=vocabulary + len(FIRST),
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        num_threads=1,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*FIRST.values(), *codes, *LAST.values()])
    backend = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=codes, **FIRST, **LAST)
    return TextTokenizer(backend, max_tokens, prompts)


def load_tokenizer(
    folder_or_name: Path | str, max_tokens: int = 128, prompts: Mapping[str, str] | None = None
) -> TextTokenizer:
    """A saved tokenizer, or one of the hub's by name; never runs code that comes with it. prompts: see TextTokenizer.

    Raises InputError if it is neither in that folder nor on the hub or in its local cache.
    """
    try:
        backend = AutoTokenizer.from_pretrained(str(folder_or_name), trust_remote_code=False)
        if isinstance(backend, MBartTokenizer):
            backend = _as_published(backend, str(folder_or_name))
    except Exception as error:  # tokenizers raises bare ones for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"tokenizer {str(folder_or_name)!r} cannot be loaded ({reason}); expected a folder with tokenizer.json "
            "or a name on the Hugging Face hub (offline: one that was downloaded before)"
        ) from None
    return TextTokenizer(backend, max_tokens, prompts)


def published_file(folder_or_name: Path | str, name: str) -> Path | None:
    """A file of a local folder, or of the hub's or its local cache; None if there is none."""
    found = cached_file(
        str(folder_or_name),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _as_published(backend: MBartTokenizer, name: str) -> PreTrainedTokenizerFast:
    """transformers' MBartTokenizer (5.23) takes the pieces from the files and nothing else, so that text is not
    normalised as in the model's training, and full-width forms, for one, become <unk>. Here the files decide."""
    file = published_file(name, "tokenizer.json")
    model = published_file(name, "sentencepiece.bpe.model")
    if file is not None:
        tokenizer = Tokenizer.from_file(str(file))
    else:
        tokenizer = Tokenizer.from_str(backend.backend_tokenizer.to_str())
        if model is not None:
            rules = read_sentencepiece(model).normalizer_spec.precompiled_charsmap
            tokenizer.normalizer = normalizers.Precompiled(rules) if rules else None
    vocabulary = tokenizer.get_vocab()
    codes = [code for code in MBART_CODES.values() if code in vocabulary]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=codes, **FIRST, **LAST)


def read_sentencepiece(path: Path) -> Any:
    """A sentencepiece model as its message (ModelProto); InputError if the file is none."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf has its own
        raise InputError(f"{path}: no sentencepiece model ({error}); fetch the tokenizer again") from None
    return model


def _primary(language: str) -> str:
    return language.replace("_", "-").split("-")[0].lower()
