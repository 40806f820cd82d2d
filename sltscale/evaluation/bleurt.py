"""BLEURT, a learnt score: how well a sentence says what the reference says, in the eyes of a model that was trained on
people's ratings (Sellam et al. 2020, arXiv 2004.04696).

Its checkpoints of BERT's architecture are sequence classifiers with one output, which transformers loads without any
code of their own; docs/evaluation.md says which there are and which cannot be loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sltscale import parallel
from sltscale.errors import InputError
from sltscale.evaluation.translation import one_line
from sltscale.models.pretrained import load_pretrained

LONGEST = 512  # tokens of a pair, what its longest checkpoints take
BATCH = 32  # pairs at a time; no score depends on it
WANTED = (
    "expected a folder or hub name of a BERT with one output, config.json, model.safetensors and tokenizer.json, such "
    "as Elron/bleurt-base-512; offline machines need the folder"
)


@dataclass(frozen=True)
class Scored:
    """value: mean over sentences of what the model gives, times 100. truncated: pairs that were longer than it takes.
    signature: the checkpoint's name, the sha256 of its weights, and how it was asked."""

    value: float
    truncated: int
    signature: str


class Bleurt:
    """A checkpoint by folder or hub name, on the CPU until it scores.

    InputError if it is missing (or the machine is offline and has not got it), has other weights than safetensors,
    needs code of its own, or is no sequence classifier with one output and a tokenizer that fits.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        config = _config(name)
        self._tokenizer = _tokenizer(name, getattr(config, "vocab_size", 0))
        model = load_pretrained(AutoModelForSequenceClassification, name, trust_remote_code=False)
        self._model: Any = model.eval()
        positions = getattr(config, "max_position_embeddings", LONGEST)
        self._longest: int = min(LONGEST, positions, self._tokenizer.model_max_length)

    def score(self, hypotheses: Sequence[str], references: Sequence[str], device: torch.device) -> Scored:
        """Of one hypothesis and one reference per clip, the same on every rank, which share the work (a collective).
        InputError if there are none or the two numbers differ."""
        if not references or len(hypotheses) != len(references):
            raise InputError(
                f"{len(hypotheses)} hypotheses and {len(references)} references; expected the same number, at least one"
            )
        mine = slice(parallel.rank(), None, parallel.world_size())
        parts = parallel.gather_objects(self.score_each(hypotheses[mine], references[mine], device))
        each, truncated = [score for scores, _ in parts for score in scores], sum(cut for _, cut in parts)
        name = Path(self.name).resolve().name if Path(self.name).is_dir() else self.name
        digest = _digest(self._model.state_dict())
        signature = f"{name}|sha256:{digest}|tokens:{self._longest}|mean:sentences|times:100"
        return Scored(100 * math.fsum(each) / len(each), truncated, signature)

    @torch.inference_mode()
    def score_each(
        self, hypotheses: Sequence[str], references: Sequence[str], device: torch.device
    ) -> tuple[list[float], int]:
        """(what the model gives for each pair, how many pairs were cut to its length). About 0 to 1, but nothing keeps
        it there. Texts are brought to one line first, as for every other score; an empty hypothesis is asked for too.
        """
        if not hypotheses:
            return [], 0
        ours, theirs = ([one_line(text) for text in texts] for texts in (hypotheses, references))
        lengths = [len(ids) for ids in self._tokenizer(theirs, ours, verbose=False)["input_ids"]]
        order = sorted(range(len(ours)), key=lambda pair: lengths[pair])
        model = self._model.to(device)
        found = [0.0] * len(ours)
        for start in range(0, len(order), BATCH):
            pairs = order[start : start + BATCH]
            batch = self._tokenizer(  # the reference comes first, as in BLEURT's training
                [theirs[pair] for pair in pairs],
                [ours[pair] for pair in pairs],
                truncation="longest_first",
                max_length=self._longest,
                padding=True,
                return_tensors="pt",
            )
            logits: Tensor = model(**batch.to(device)).logits
            for pair, value in zip(pairs, logits[:, 0].tolist(), strict=True):
                found[pair] = value
        return found, sum(length > self._longest for length in lengths)


def load_bleurt(name: str) -> Bleurt:
    """On every rank, rank 0 first, which may have to fetch it; InputError on all if that fails (a collective)."""
    first: list[Bleurt] = []
    parallel.on_rank_zero(lambda: first.append(Bleurt(name)))
    return first[0] if first else Bleurt(name)


def _config(name: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        if "model type `bleurt`" in reason:
            raise InputError(
                f"evaluation.bleurt {name!r} is of model type bleurt, an architecture outside of transformers, as "
                f"BLEURT-20's conversions are, and no code that comes with a checkpoint is run; {WANTED}"
            ) from None
        raise InputError(f"evaluation.bleurt {name!r} cannot be loaded ({reason}); {WANTED}") from None
    if config.num_labels != 1:
        raise InputError(f"evaluation.bleurt {name!r} has {config.num_labels} outputs; {WANTED}")
    return config


def _tokenizer(name: str, size: int) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare ones for a damaged file
        raise InputError(
            f"the tokenizer of evaluation.bleurt {name!r} cannot be loaded ({_first_line(error)}); {WANTED}"
        ) from None
    # Without its files transformers makes one up, of special tokens alone.
    if not len(tokenizer.all_special_ids) < len(tokenizer) <= size or tokenizer.pad_token_id is None:
        raise InputError(
            f"evaluation.bleurt {name!r} has a tokenizer of {len(tokenizer)} tokens and a model of {size}, or no "
            f"padding token; {WANTED}"
        )
    tokenizer.padding_side = "right"  # a position is counted from the left, so padding there would change a score
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
