"""Visual tokens of all clips as shards, written by all ranks: each clip of each split once, as evaluation sees it.

A shard holds a fixed range of a split's clips, and each clip is encoded by itself, so its bytes are the same on any
number of ranks. It is written by one rank, at once or not at all; what an earlier start has finished stays, once its
bytes have been compared with the record of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from sltscale import parallel
from sltscale.config import DataSettings, FeatureSettings, Recipe
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.splits import open_splits
from sltscale.data.batches.stream import evaluation_batches
from sltscale.data.shards.features import FRAME_SETTINGS, MEMBER, Origin, encode_tokens
from sltscale.data.shards.merge import merge_split
from sltscale.data.shards.parts import Part, Parts
from sltscale.data.shards.tars import Sample, write_tar
from sltscale.errors import InputError
from sltscale.models.visual import VisualEncoder
from sltscale.structures import Ragged

Tokens = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Job:
    """One shard. clips: their numbers in the joined selection of all splits."""

    parts: Parts
    number: int
    clips: range

    def finished(self) -> bool:
        part = self.parts.read(self.number)
        if part is None:
            return False
        tar = self.parts.tar(self.number)
        with tar.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == part.shard.sha256:
                return True
        print(f"warning: {tar} is not as it was written; writing it again", flush=True)
        return False


def write_features(
    encoder: VisualEncoder,
    digest: str,
    recipe: Recipe,
    settings: FeatureSettings,
    splits: Mapping[str, Selection],
    device: torch.device,
    watch: Callable[[str], None],
) -> None:
    """Write what is missing of the features in ``settings.folder``, then their indexes, and open them as readers do.

    A collective. encoder: on ``device``, in evaluation mode. digest: see ``methods.encoder``. watch: told what is being
    done. InputError if the folder holds other features, cannot be written, or a clip cannot be read.
    """
    out = Path(settings.folder)
    origins = {
        split: _origin(clips, digest, encoder.width, settings.dtype, recipe.data) for split, clips in splits.items()
    }
    parallel.on_rank_zero(lambda: _begin(out, splits, origins, settings.clips_per_shard))
    every = Selection.joined(list(splits.values()))
    jobs = _unfinished(_jobs(out, splits, settings.clips_per_shard))
    rank, world_size = parallel.rank(), parallel.world_size()
    mine = jobs[rank::world_size]
    try:
        with ExitStack() as held, _one_thread(device):
            for split in splits:
                numbers = [job.number for job in mine if job.parts.split == split]
                held.enter_context(Parts(out, split).held(numbers))
            encoded = _encode(encoder, every, recipe, mine, device)
            for turn in range(-(-len(jobs) // world_size)):  # in step, so that no rank waits for long in the end
                watch(f"shard {turn * world_size + rank + 1} of {len(jobs)} of features")
                if turn < len(mine):
                    job = mine[turn]
                    samples = _samples(every, len(job.clips), encoded, settings.dtype)
                    shard = write_tar(job.parts.tar(job.number), samples, MEMBER)
                    job.parts.write(job.number, Part(shard, []))
                parallel.barrier()
            encoded.close()
        parallel.barrier()  # all have let go of what they held
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written ({error.strerror or error}); what is finished is kept, the same command goes on"
        ) from None
    watch("the indexes of the features")
    parallel.on_rank_zero(lambda: _merge(out, splits))
    open_splits(recipe.data.model_copy(update={"features": settings.folder, "bad_data": "stop"}))


def _origin(clips: Selection, digest: str, width: int, dtype: str, data: DataSettings) -> Origin:
    (index,), (without,) = clips.indexes, clips.without
    frames: dict[str, Any] = {name: getattr(data, name) for name in FRAME_SETTINGS}
    return Origin(encoder=digest, shards=index.digest, without=tuple(without), width=width, dtype=dtype, **frames)


def _begin(out: Path, splits: Mapping[str, Selection], origins: Mapping[str, Origin], clips_per_shard: int) -> None:
    for split, clips in splits.items():
        index, parts = clips.indexes[0], Parts(out, split)
        settings = {
            "format": 2,
            "corpus": index.corpus,
            "split": split,
            "frame_size": index.frame_size,
            "clips": len(clips),
            "clips_per_shard": clips_per_shard,
            "features": origins[split].to_json(),
        }
        with parts.held(()):
            parts.begin(settings, [], {}, None)


def _jobs(out: Path, splits: Mapping[str, Selection], clips_per_shard: int) -> list[_Job]:
    jobs = []
    start = 0
    for split, clips in splits.items():
        end = start + len(clips)
        for number, first in enumerate(range(start, end, clips_per_shard)):
            jobs.append(_Job(Parts(out, split), number, range(first, min(end, first + clips_per_shard))))
        start = end
    return jobs


def _unfinished(jobs: Sequence[_Job]) -> list[_Job]:
    """The ranks share the reading."""
    rank, world_size = parallel.rank(), parallel.world_size()
    done = {place for place in range(rank, len(jobs), world_size) if jobs[place].finished()}
    finished = set().union(*parallel.gather_objects(done))
    return [job for place, job in enumerate(jobs) if place not in finished]


def _encode(
    encoder: VisualEncoder, clips: Selection, recipe: Recipe, jobs: Sequence[_Job], device: torch.device
) -> Generator[tuple[int, Tokens], None, None]:
    """(clip number, its tokens [n, width]) of the jobs' clips, in order, each encoded by itself."""
    size = recipe.evaluation.batch
    batches = [list(job.clips[first : first + size]) for job in jobs for first in range(0, len(job.clips), size)]
    total = sum(map(len, batches))
    with tqdm(total=total, desc="features", unit="clip", disable=parallel.rank() != 0) as bar:
        for numbers, batch in zip(batches, evaluation_batches(clips, recipe.data, batches), strict=True):
            for number, frames in zip(numbers, batch.frames.to(device).split(), strict=True):
                with torch.inference_mode():
                    tokens = encoder(Ragged.from_lengths(frames, [len(frames)])).values
                bar.update()
                yield number, tokens.float().cpu().numpy()


def _samples(clips: Selection, count: int, encoded: Iterator[tuple[int, Tokens]], dtype: str) -> Iterator[Sample]:
    """The next ``count`` clips, ready for their tar."""
    for clip, tokens in islice(encoded, count):
        index, number = clips.locate(clip)
        # So that they last as long as the clip; the limit keeps both numbers within the index's 32 bits.
        rate = Fraction(*index.fps[number].tolist()) * len(tokens) / int(index.frames[number])
        fps = rate.limit_denominator(10**6).as_integer_ratio()
        columns = {
            "id": index.id(number),
            "text": index.text(number),
            "language": index.language(number),
            "frames": len(tokens),
            "fps": fps,
            "source": index.source(number),
            "signer": index.signer(number),
        }
        place = {"key": index.key(number), "resolution": tuple(index.resolution[number].tolist())}
        facts = {**columns, "fps": list(fps), "split": index.split}
        yield Sample(facts, encode_tokens(tokens, dtype), columns | place)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU the last bits of a sum depend on the number of threads that share it."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _merge(out: Path, splits: Mapping[str, Selection]) -> None:
    for split in splits:
        parts = Parts(out, split)
        with parts.held(None):
            merge_split(parts)
