"""The few containers that travel between the parts of sltscale.

Letters: B videos, N packed frames (sum of lengths), T longest video, L text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """B sequences of different lengths, packed one behind the other without padding.

    values: [N, ...], the sequences' steps, N = sum of lengths.
    cu_seqlens: int32 [B+1], where each sequence starts; begins at 0, never decreases, ends at N.
    max_seqlen: longest sequence, kept on the host so that no layer has to wait for the device.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Sequence[int]) -> Ragged:
        """Pack ``values`` [N, ...] under host-known ``lengths``; ValueError if they do not add up to N."""
        if any(length < 0 for length in lengths) or sum(lengths) != values.shape[0]:
            raise ValueError(f"lengths {list(lengths)} do not add up to the {values.shape[0]} packed steps")
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=starts[1:])
        return cls(values, starts.to(values.device), max(lengths, default=0))

    @classmethod
    def from_list(cls, sequences: Sequence[Tensor]) -> Ragged:
        """Pack a non-empty list of [T_b, ...] tensors."""
        return cls.from_lengths(torch.cat(list(sequences)), [len(sequence) for sequence in sequences])

    @classmethod
    def from_padded(cls, padded: Tensor, mask: Tensor, like: Ragged) -> Ragged:
        """The inverse of ``to_padded``: keep the steps of ``padded`` [B, T, ...] where ``mask`` [B, T] is true.

        ``like`` gives the lengths (those of the mask), so that the device is not asked for them.
        """
        return like.with_values(padded[mask.bool()])

    def with_values(self, values: Tensor) -> Ragged:
        """The same lengths around other values [N, ...]."""
        if values.shape[0] != self.values.shape[0]:
            raise ValueError(f"expected {self.values.shape[0]} packed steps, found {values.shape[0]}")
        return Ragged(values, self.cu_seqlens, self.max_seqlen)

    @property
    def lengths(self) -> Tensor:
        """int32 [B]."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def mask(self) -> Tensor:
        """bool [B, T], true at valid steps."""
        steps = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return steps[None, :] < self.lengths[:, None]

    def to_padded(self, fill: float = 0.0) -> tuple[Tensor, Tensor]:
        """(values [B, T, ...] with ``fill`` after each sequence's end, mask bool [B, T])."""
        mask = self.mask()
        padded = self.values.new_full((len(self), self.max_seqlen, *self.values.shape[1:]), fill)
        return padded.masked_scatter(mask.view(*mask.shape, *[1] * (padded.dim() - 2)), self.values), mask

    def split(self) -> list[Tensor]:
        """B tensors [T_b, ...] (views)."""
        return list(torch.split(self.values, self.lengths.tolist()))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        return Ragged(
            self.values.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.max_seqlen,
        )


@dataclass(frozen=True)
class VideoBatch:
    """One rank's share of a global batch: frames, texts and languages in the same order.

    frames: Ragged uint8 [N, 3 H / 2, W], as clips are stored (YUV 4:2:0, ITU-R BT.601, limited range): H rows of Y,
    then U and V at half the height and width, one behind the other. They become RGB on the device, in the frame
    encoder. Or, in their place, stored visual tokens: Ragged float [N, width]. retries: reads that had to be tried
    again for it.
    """

    ids: list[str]
    frames: Ragged
    texts: list[str]
    languages: list[str]
    retries: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, sizes: Sequence[int]) -> list[VideoBatch]:
        """Consecutive parts of so many clips each; frames are views."""
        lengths = self.frames.lengths.tolist()
        parts, clip, frame = [], 0, 0
        for size in sizes:
            last, own = clip + size, lengths[clip : clip + size]
            frames = Ragged.from_lengths(self.frames.values[frame : frame + sum(own)], own)
            parts.append(VideoBatch(self.ids[clip:last], frames, self.texts[clip:last], self.languages[clip:last]))
            clip, frame = last, frame + sum(own)
        return parts

    def to(self, device: torch.device | str) -> VideoBatch:
        return VideoBatch(self.ids, self.frames.to(device, non_blocking=True), self.texts, self.languages)


@dataclass(frozen=True)
class TextBatch:
    """Tokenised sentences: input_ids int64 [B, L], attention_mask int64 [B, L] (1 = token, 0 = padding).

    Each is tokens, </s>, language id. The language id is a token of the vocabulary (mBART's language code) or, where a
    model is told the language otherwise, a number above all its ids. masked: the same sentences with words masked, for
    a method that reads those too.
    """

    input_ids: Tensor
    attention_mask: Tensor
    masked: TextBatch | None = None

    def language_ids(self) -> Tensor:
        """[B]."""
        return self.input_ids.gather(1, self.attention_mask.sum(1, keepdim=True) - 1)[:, 0]

    def without_language(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """(ids [B, L-1] of tokens and </s>, attention mask [B, L-1])."""
        mask = self.attention_mask[:, 1:]
        return self.input_ids[:, :-1].masked_fill(mask == 0, pad_id), mask

    def to(self, device: torch.device | str) -> TextBatch:
        return TextBatch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            None if self.masked is None else self.masked.to(device),
        )


@dataclass(frozen=True)
class Features:
    """What a contrastive loss needs of this rank's clips and sentences, apart from the model that made it.

    rows: by name, [B, ...], one row a clip; those of token sequences are [B, T, ...] beside a mask [B, T], and padded
    with zeros to the longest where parts are put together. shared: by name, the same for all rows, e.g. the scale.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return self.rows | self.shared

    @classmethod
    def concatenate(cls, parts: Sequence[Features]) -> Features:
        rows = {}
        for name, first in parts[0].rows.items():
            own = [part.rows[name] for part in parts]
            if first.dim() > 1:
                longest = max(tensor.shape[1] for tensor in own)
                own = [F.pad(tensor, (*[0, 0] * (tensor.dim() - 2), 0, longest - tensor.shape[1])) for tensor in own]
            rows[name] = torch.cat(own)
        return cls(rows, parts[0].shared)


@dataclass(frozen=True)
class LossOutput:
    """A loss as sum and count, never as a mean: the training loop divides by the count over the *global* batch.

    loss_sum: scalar with gradient; count: scalar, the anchors or tokens summed over; metrics: detached scalars,
    each already a mean over this rank's items.
    """

    loss_sum: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
