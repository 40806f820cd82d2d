"""What there is to train on, and what of it a rank gets in one step: from the shards, or as assumed without them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sltscale.config import Recipe
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import WASTE_STEPS, Part, Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.splits import training_parts
from sltscale.data.shards.index import open_index
from sltscale.data.text import build_corpus_tokenizer, load_tokenizer
from sltscale.forecast.trace import Share, token_width

SENTENCES = 2000  # that tokens are counted of
TOKENS = 32  # of a sentence, where nothing is known; spoken-language sentences of the field have 10 to 30


@dataclass(frozen=True)
class Corpus:
    """Training clips. frames: of each, as used. tokens: of sentences, taken in turn. bytes: of all, None if unknown.
    complete: whether these are all clips, or as many as make a batch. basis: where this is from, for people."""

    frames: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    parts: list[Part] | None
    bytes: int | None
    complete: bool
    basis: str

    def plan(self, recipe: Recipe) -> Plan:
        rule = BatchRule.of(recipe.data)
        return Plan(self.frames, recipe.seed, rule, parts=self.parts, micro_frames=recipe.data.micro_frames)


def read_corpus(recipe: Recipe) -> Corpus:
    """From the index of the recipe's shards; their clips are not read. InputError if there is none."""
    data, text = recipe.data, recipe.text
    train = Selection([open_index(place, "train") for place in (data.shards, *(part.shards for part in data.mix))])
    sample = np.unique(np.linspace(0, len(train) - 1, min(SENTENCES, len(train)), dtype=np.int64)).tolist()
    sentences = [train.text(clip) for clip in sample]
    if text.tokenizer == "corpus":
        tokenizer = build_corpus_tokenizer(
            sentences, train.languages(), text.vocabulary, text.max_tokens, recipe.prompts
        )
    else:
        tokenizer = load_tokenizer(text.tokenizer, text.max_tokens, recipe.prompts)
    ids = tokenizer.encode(sentences, [train.language(clip) for clip in sample])
    frames = frames_after_sampling(train.frames, recipe.on_video().data)
    width = token_width(recipe)
    return Corpus(
        frames=frames,
        tokens=ids.attention_mask.sum(1).numpy(),
        parts=training_parts(data, train),
        bytes=sum(int(index.size.sum()) for index in train.indexes) if width is None else 4 * width * int(frames.sum()),
        complete=True,
        basis=f"the index of {train.name}; tokens of {len(sample)} of its sentences",
    )


def assume_corpus(recipe: Recipe, clips: int | None, frames: int | None, tokens: int | None) -> Corpus:
    """All clips alike. Without ``clips`` one batch of them, without ``frames`` as long as the recipe admits."""
    data = recipe.data
    frames = min(frames or data.max_frames, data.max_frames)
    tokens = min(tokens or TOKENS, recipe.text.max_tokens)
    batch = min(data.global_batch or 2**40, (data.global_frames or 2**40) // frames)
    count = clips or max(1, batch)
    return Corpus(
        frames=np.full(count, frames),
        tokens=np.array([tokens]),
        parts=None,
        bytes=None,
        complete=clips is not None,
        basis=f"no shards at {data.shards}: assumed that every clip has {frames} frames and {tokens} tokens",
    )


def busiest_share(corpus: Corpus, recipe: Recipe, world_size: int) -> tuple[Share, tuple[int, ...]]:
    """The share with most frames among those of WASTE_STEPS steps of the first epoch, and the clips of each of its
    micro-batches. InputError if there are more ranks than clips in a batch."""
    plan = corpus.plan(recipe)
    plan.check_world_size(world_size, 1)
    steps = plan.steps(1)
    best: list[npt.NDArray[np.int64]] = []
    most = -1
    for step in range(0, steps, max(1, steps // WASTE_STEPS)):
        for parts in plan.micro_batches(step, world_size):
            frames = sum(int(corpus.frames[part].sum()) for part in parts)
            if frames > most:
                best, most = parts, frames
    clips = np.concatenate(best)
    tokens = corpus.tokens[clips % len(corpus.tokens)]
    share = Share(tuple(corpus.frames[clips].tolist()), tuple(tokens.tolist()))
    return share, tuple(len(part) for part in best)


@dataclass(frozen=True)
class Length:
    """Of the whole run. bytes: that each node reads in an epoch, None if unknown."""

    steps: int
    clips: int
    frames: int
    tokens: int
    bytes: int | None


def run_length(corpus: Corpus, recipe: Recipe, nodes: int) -> Length | None:
    """None if it is not known how many clips there are."""
    if not corpus.complete:
        return None
    plan, epochs = corpus.plan(recipe), recipe.train.epochs
    clips = plan.clips_per_epoch * epochs
    share = plan.clips_per_epoch / len(corpus.frames)
    if corpus.parts is None:
        frames = int(corpus.frames.sum())
    else:
        frames = round(sum(part.quota * float(corpus.frames[part.clips].mean()) for part in corpus.parts))
    return Length(
        steps=plan.steps(epochs),
        clips=clips,
        frames=frames * epochs,
        tokens=round(float(corpus.tokens.mean()) * clips),
        bytes=None if corpus.bytes is None else round(corpus.bytes * share / nodes),
    )
