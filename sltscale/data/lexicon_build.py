"""From shards to a lexicon of pseudo-glosses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sltscale.data.lexicon import Lexicon, build_lexicon
from sltscale.data.shards.index import open_index
from sltscale.data.tagging import tagger
from sltscale.data.word_vectors import Vectors, corpus_vectors, published_vectors
from sltscale.errors import InputError


def build_from_shards(
    folders: Sequence[str],
    *,
    splits: Sequence[str] = ("train",),
    language: str | None = None,
    tagger_name: str = "auto",
    vectors_file: Path | None = None,
    width: int = 300,
    max_share: float = 1.0,
) -> tuple[Lexicon, list[str]]:
    """(the lexicon of these splits' sentences, lines that say what was found).

    language: needed where the shards hold several; only its clips are taken. width: of vectors learnt from the
    sentences, without ``vectors_file``. InputError for shards without such a split or language, and as ``tagger`` and
    ``published_vectors`` raise it.
    """
    indexes = [open_index(folder, split) for folder in folders for split in splits]
    languages = sorted({one for index in indexes for one in index.languages()})
    if language is None and len(languages) == 1:
        language = languages[0]
    if language not in languages:
        found = "no language is chosen" if language is None else f"there is no language {language!r}"
        raise InputError(f"{found}; the shards hold {', '.join(languages)}: choose one with --language")
    texts = [
        index.text(int(clip)) for index in indexes if language in index.languages() for clip in index.clips_of(language)
    ]
    analyser = tagger(tagger_name, language)
    missing: list[str] = []

    def vectors(glosses: Sequence[str], sentences: Sequence[list[str]]) -> Vectors:
        if vectors_file is None:
            return corpus_vectors(glosses, sentences, width)
        found, unknown = published_vectors(vectors_file, glosses)
        missing.extend(unknown)
        return found

    origin = {
        "shards": {f"{index.folder}, {index.split}": index.digest for index in indexes},
        "language": language,
        "tagger": analyser.name,
        "vectors": "the corpus's own sentences" if vectors_file is None else vectors_file.name,
        "max_share": max_share,
    }
    lexicon = build_lexicon(texts, analyser.analyse, vectors, max_share=max_share, origin=origin)
    silent = sum(not numbers for numbers in lexicon.of_sentence.values())
    lines = [
        f"{len(lexicon)} pseudo-glosses in {len(lexicon.of_sentence)} different sentences of {len(texts)}, by "
        f"{analyser.name}; {silent} sentences hold none",
        f"vectors of width {lexicon.vectors.shape[1]} from {origin['vectors']}",
    ]
    if missing:
        lines.append(f"without a vector, in a random direction: {len(missing)}, e.g. {', '.join(missing[:5])}")
    return lexicon, lines
