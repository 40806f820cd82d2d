"""Sentences to pseudo-glosses: the lemmas of their content words (Sign2GPT, arXiv 2405.04164 section 3.2; HFA).

With spaCy where one of its models is installed; otherwise with HanTa (German, English) or jieba (Chinese), whose data
ships in their packages: pip install 'sltscale[lexicon]'. Without any analysis: the words as they stand.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sltscale.data.lexicon import Analyse
from sltscale.errors import InputError

CONTENT = {"NOUN", "NUM", "ADV", "PRON", "PROPN", "ADJ", "VERB"}  # universal parts of speech, as in Sign2GPT's code
SPACY_MODELS = {
    "de": ("de_dep_news_trf", "de_core_news_lg", "de_core_news_md", "de_core_news_sm"),
    "en": ("en_core_web_trf", "en_core_web_lg", "en_core_web_md", "en_core_web_sm"),
    "zh": ("zh_core_web_trf", "zh_core_web_lg", "zh_core_web_md", "zh_core_web_sm"),
}
HANTA_MODELS = {"de": "morphmodel_ger.pgz", "en": "morphmodel_en.pgz"}
# Content words in the taggers' own terms: STTS (without auxiliaries, determiners and particles), the BNC's C5, ICTCLAS.
STTS = re.compile(r"NN|NE|CARD|ADV|ADJ|PROAV|PAV|PWAV|VV|P(PER|RF|DS|IS|POSS|RELS|WS)\b")
C5 = re.compile(r"NN|NP|CRD|ORD|AV|AJ|PN|VV")
ICTCLAS = re.compile(r"[nvadrmtsbzjil]")
# A word, or a single Chinese character, as Chinese is written without spaces.
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Tagger:
    """name: what it is, for the record."""

    name: str
    analyse: Analyse


def tagger(wanted: str, language: str = "") -> Tagger:
    """The tagger for a language (BCP-47). InputError, naming what to install, if there is none.

    wanted: "words" for words as they stand, lower-cased; "auto" for the first of the language's spaCy models that is
    installed, otherwise the tagger that ships its data; "shipped" for the latter; else the name of a spaCy model.
    """
    primary = language.replace("_", "-").split("-")[0].lower()
    if wanted == "words":
        return Tagger("words", _words)
    if wanted not in ("auto", "shipped"):
        if not _has_spacy_model(wanted):
            raise InputError(
                f"spaCy model {wanted!r} is not installed: python -m spacy download {wanted}, or take auto, shipped or "
                "words"
            )
        return _spacy(wanted, primary)
    if wanted == "auto":
        for model in SPACY_MODELS.get(primary, ()):
            if _has_spacy_model(model):
                return _spacy(model, primary)
    if primary in HANTA_MODELS and importlib.util.find_spec("HanTa"):
        return _hanta(primary)
    if primary == "zh" and importlib.util.find_spec("jieba"):
        return _jieba()
    known = primary in SPACY_MODELS
    remedy = "pip install 'sltscale[lexicon]'" if known else f"expected one of {', '.join(SPACY_MODELS)}"
    raise InputError(f"no tagger for language {language!r} is installed: {remedy}, or take words")


def _words(sentences: Sequence[str]) -> Iterable[list[str]]:
    return (WORD.findall(sentence.lower()) for sentence in sentences)


def _has_spacy_model(name: str) -> bool:
    if importlib.util.find_spec("spacy") is None:
        return False
    return bool(importlib.import_module("spacy.util").is_package(name))


def _spacy(model: str, language: str) -> Tagger:
    spacy: Any = importlib.import_module("spacy")
    pipeline = spacy.load(model)

    def analyse(sentences: Sequence[str]) -> Iterable[list[str]]:
        for document in pipeline.pipe(sentences):
            content = (token for token in document if token.pos_ in CONTENT)
            # Sign2GPT takes Chinese words as they stand: the models know no lemmas there.
            yield [(token.text if language == "zh" else token.lemma_).lower() for token in content]

    return Tagger(f"spacy {spacy.__version__} {model} {pipeline.meta['version']}", analyse)


def _hanta(language: str) -> Tagger:
    hanta: Any = importlib.import_module("HanTa.HanoverTagger")
    model = hanta.HanoverTagger(HANTA_MODELS[language])
    content = STTS if language == "de" else C5

    def analyse(sentences: Sequence[str]) -> Iterable[list[str]]:
        for sentence in sentences:
            words = re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", sentence)
            tagged = model.tag_sent(words, taglevel=1) if words else []
            yield [lemma.lower() for word, lemma, tag in tagged if content.match(tag) and WORD.search(word)]

    return Tagger(f"HanTa {_version('HanTa')} {HANTA_MODELS[language]}", analyse)


def _jieba() -> Tagger:
    posseg: Any = importlib.import_module("jieba.posseg")

    def analyse(sentences: Sequence[str]) -> Iterable[list[str]]:
        for sentence in sentences:  # some corpora put a space between all characters
            words = posseg.cut("".join(sentence.split()))
            yield [pair.word for pair in words if ICTCLAS.match(pair.flag)]

    return Tagger(f"jieba {_version('jieba')}", analyse)


def _version(package: str) -> str:
    return importlib.metadata.version(package)
