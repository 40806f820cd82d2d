"""Translate or retrieve a whole split on all ranks: every clip exactly once, whatever their number."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sltscale import parallel
from sltscale.config import Recipe
from sltscale.data.batches.augment import frames_after_sampling
from sltscale.data.batches.dealing import evaluation_shares
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import evaluation_batches
from sltscale.data.noise import sampling_seeds
from sltscale.data.text import TextTokenizer
from sltscale.errors import InputError
from sltscale.evaluation import report, retrieval, translation
from sltscale.evaluation.bleurt import load_bleurt
from sltscale.methods.base import RetrievalMethod
from sltscale.models.translator import Translator
from sltscale.structures import VideoBatch

Scores = dict[str, Any]


def evaluate_split(
    method: torch.nn.Module,
    tokenizer: TextTokenizer,
    recipe: Recipe,
    clips: Selection,
    out: Path,
    device: torch.device,
) -> Scores:
    """What the method is for, retrieval or translation scores; files under ``out``.

    A collective; every rank returns the same scores. InputError, before any decoding, if ``out`` cannot be written, the
    split mixes languages, or the recipe's BLEURT cannot be loaded.
    """
    languages = clips.languages()
    if len(languages) != 1:
        raise InputError(f"{clips.name}: holds {', '.join(languages)}; scores are of one language")
    parallel.on_rank_zero(lambda: report.prepare(out, clips.digest, clips.split))
    if isinstance(method, RetrievalMethod):
        return retrieve_split(method, tokenizer, recipe, clips, out, device)
    if isinstance(method, Translator):
        return translate_split(method, tokenizer, recipe, clips, out, device)
    raise TypeError(f"no evaluation for {type(method).__name__}")


def translate_split(
    method: Translator,
    tokenizer: TextTokenizer,
    recipe: Recipe,
    clips: Selection,
    out: Path,
    device: torch.device,
) -> Scores:
    """Beam-search every clip; BLEU, chrF, ROUGE-L, BLEU against other clips' sentences, and BLEURT if it is wanted."""
    settings = recipe.evaluation
    bleurt = None if settings.bleurt is None else load_bleurt(settings.bleurt)
    mine: dict[int, str] = {}
    for numbers, batch in _my_batches(clips, recipe, "translating"):
        mine |= zip(numbers, _translate(method, tokenizer, recipe, batch, device), strict=True)
    hypotheses_of = {clip: text for part in parallel.gather_objects(mine) for clip, text in part.items()}
    numbers = range(len(clips))
    hypotheses = [hypotheses_of[number] for number in numbers]
    references = clips.texts()
    language = clips.language(0)
    scores: Scores
    scores, otherwise = (
        translation.score(
            hypotheses, references, language=language, convention=settings.convention, append_period=append_period
        )
        for append_period in (settings.append_period, not settings.append_period)
    )
    name = "bleu4_without_period" if settings.append_period else "bleu4_with_period"
    scores[name] = otherwise["bleu4"]
    if len(clips) > 1:
        scores["bleu4_shuffled"] = translation.score_shuffled(
            hypotheses,
            references,
            language=language,
            convention=settings.convention,
            append_period=settings.append_period,
            seed=recipe.seed,
        )
    if bleurt is not None:
        learnt = bleurt.score(hypotheses, references, device)
        scores |= {"bleurt": learnt.value, "bleurt_truncated": learnt.truncated}
        scores["signature"]["bleurt"] = learnt.signature
    scores |= _provenance(clips) | {
        "language": language,
        "beams": settings.beams,
        "length_penalty": settings.length_penalty,
        "max_new_tokens": settings.max_new_tokens,
    }
    if settings.sampling is not None:
        scores |= settings.sampling.model_dump()
    ids = [clips.id(number) for number in numbers]
    parallel.on_rank_zero(lambda: report.write_translation(out, ids, hypotheses, references, scores))
    return scores


def retrieve_split(
    method: RetrievalMethod, tokenizer: TextTokenizer, recipe: Recipe, clips: Selection, out: Path, device: torch.device
) -> Scores:
    """Similarity of every clip with every sentence; recall and ranks both ways. Without a contrastive part there is
    no similarity, and only the number of clips is returned."""
    if not method.compared:
        return _provenance(clips)
    mine: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        for numbers, batch in _my_batches(clips, recipe, "encoding"):
            video, video_mask = method.encode_video(batch.frames.to(device))
            text, text_mask = method.encode_text(tokenizer.encode(batch.texts, batch.languages).to(device))
            for row, clip in enumerate(numbers):
                mine[clip] = (video[row][video_mask[row].bool()].cpu(), text[row][text_mask[row].bool()].cpu())
    encoded = {clip: pair for part in parallel.gather_objects(mine) for clip, pair in part.items()}

    def rank_all() -> Scores:
        numbers = range(len(clips))
        with torch.inference_mode():
            similarity = method.similarity(
                *_pad([encoded[number][0] for number in numbers], device),
                *_pad([encoded[number][1] for number in numbers], device),
            )
        texts = clips.texts()
        scores: Scores = retrieval.score_both(similarity.cpu().numpy(), texts) | _provenance(clips)
        report.write_retrieval(out, [clips.id(number) for number in numbers], texts, similarity.cpu().numpy(), scores)
        return scores

    return parallel.on_rank_zero(rank_all)


@torch.inference_mode()
def _translate(
    method: Translator, tokenizer: TextTokenizer, recipe: Recipe, batch: VideoBatch, device: torch.device
) -> list[str]:
    settings = recipe.evaluation
    frames = batch.frames.to(device)
    languages = torch.tensor([tokenizer.language_id(language) for language in batch.languages], device=device)
    lengths: dict[str, Any] = {"length_penalty": settings.length_penalty, "max_new_tokens": settings.max_new_tokens}
    if settings.sampling is not None:
        seeds = [sampling_seeds(recipe.seed, clip, 1) for clip in batch.ids]
        drawn = method.sample(frames, languages, seeds=seeds, **settings.sampling.model_dump(), **lengths)
        return tokenizer.decode([one.ids for (one,) in drawn])
    return tokenizer.decode(method.generate(frames, languages, beams=settings.beams, **lengths))


def _provenance(clips: Selection) -> Scores:
    return {"clips": len(clips), "split": clips.split, "index": clips.digest}


def text_samples(out: Path, wanted: int) -> list[tuple[str, str, str]]:
    """A fixed choice of (id, reference, hypothesis) from a split's hypotheses.tsv."""
    path = out / "hypotheses.tsv"
    if not path.is_file():
        return []
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    chosen = random.Random(0).sample(range(len(rows)), min(wanted, len(rows)))  # noqa: S311
    return [(rows[number][0], rows[number][1], rows[number][2]) for number in chosen]


def _my_batches(clips: Selection, recipe: Recipe, verb: str) -> Any:
    """(clip numbers, batch) of this rank's share, with a progress bar on rank 0."""
    lengths = frames_after_sampling(clips.frames, recipe.data)
    mine = evaluation_shares(lengths, parallel.world_size(), recipe.evaluation.batch)[parallel.rank()]
    batches = evaluation_batches(clips, recipe.data, mine)
    show = parallel.rank() == 0
    return zip(mine, tqdm(batches, total=len(mine), desc=f"{verb} {clips.split}", disable=not show), strict=True)


def _pad(sequences: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return padded, torch.arange(padded.shape[1], device=device)[None] < lengths[:, None]
