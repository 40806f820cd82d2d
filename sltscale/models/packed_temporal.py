"""GFSLT-VLP's temporal convolution, frames to a quarter as many visual tokens, on packed sequences.

Letters: N packed steps (sum of lengths), B sequences, T longest, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltscale.config import PackedTemporalSettings
from sltscale.models.layers import GlobalBatchNorm
from sltscale.structures import Ragged

COPIES = 8  # of the first and, at least, of the last frame
KERNEL = 5
PAD_VALUE = 1.0  # the id of the padding token, which GFSLT-VLP also pads its feature vectors with


class PackedTemporalEncoder(nn.Module):
    """Ragged [N, input_width] -> Ragged [M, width]: ceil(length / 4) + 1 visual tokens of each sequence.

    zhoubenjia/GFSLT-VLP@91ba953 models.py (TemporalConv, V_encoder) and datasets.py (collate_fn): copies of the first
    and last step, then twice convolution of length 5 without padding, batch norm, ReLU and maximum of pairs. The
    convolutions run over all sequences in one row; outputs that straddle two sequences are left out.
    """

    def __init__(self, input_width: int, settings: PackedTemporalSettings) -> None:
        super().__init__()
        self.norm_over = settings.norm_over
        self.first = _ConvolutionBlock(input_width, settings.width)
        self.second = _ConvolutionBlock(settings.width, settings.width)
        self.sign_embedding = _SignEmbedding(settings.width) if settings.sign_embedding else None

    def forward(self, sequence: Ragged) -> Ragged:
        return self.tokens(edge_copies(sequence))

    def tokens(self, copied: Ragged) -> Ragged:
        """Visual tokens of steps that hold their edge copies already, as where frames were copied before their encoder,
        whose batch norm then counts the copies too (GFSLT-VLP's code)."""
        if copied.max_seqlen % 4 or len(copied.values) % 4:
            raise ValueError(f"expected lengths as edge_copies makes them, multiples of 4; longest {copied.max_seqlen}")
        if self.norm_over == "valid":
            return self._convolved(copied)
        padded, _ = copied.to_padded(fill=PAD_VALUE)
        tokens = self._convolved(Ragged.from_lengths(padded.flatten(0, 1), [copied.max_seqlen] * len(copied)))
        order = torch.arange(len(copied) + 1, device=copied.cu_seqlens.device, dtype=torch.int32)
        cu_seqlens = (copied.cu_seqlens - 3 * (KERNEL - 1) * order) // 4
        valid = torch.arange(tokens.max_seqlen, device=order.device) < cu_seqlens.diff()[:, None]
        return Ragged(tokens.values[valid.flatten()], cu_seqlens, tokens.max_seqlen)

    def _convolved(self, sequence: Ragged) -> Ragged:
        tokens = self.second(self.first(sequence))
        return tokens if self.sign_embedding is None else tokens.with_values(self.sign_embedding(tokens.values))


class _ConvolutionBlock(nn.Module):
    """Ragged [N, C_in] -> Ragged [N', C]: (length - 4) / 2 steps of each sequence; lengths are even and at least 6."""

    def __init__(self, input_width: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(input_width, width, KERNEL)
        self.norm = GlobalBatchNorm(width)

    def forward(self, sequence: Ragged) -> Ragged:
        lost = KERNEL - 1
        clips = torch.arange(len(sequence), device=sequence.values.device)
        steps = len(sequence.values) - lost * len(sequence)
        clip_of_step = clips.repeat_interleave(sequence.lengths - lost, output_size=steps)
        within = torch.arange(steps, device=clips.device) + lost * clip_of_step
        convolved = self.conv(sequence.values.T[None])[0].T.index_select(0, within)
        activated = F.relu(self.norm(convolved))
        # lengths are even, so no pair straddles two sequences
        pooled = torch.maximum(activated[0::2], activated[1::2])
        order = torch.arange(len(sequence) + 1, device=clips.device, dtype=torch.int32)
        return Ragged(pooled, (sequence.cu_seqlens - lost * order) // 2, (sequence.max_seqlen - lost) // 2)


class _SignEmbedding(nn.Module):
    """Linear, batch norm, ReLU, [M, C] -> [M, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = GlobalBatchNorm(width)
        nn.init.xavier_uniform_(self.linear.weight, gain=nn.init.calculate_gain("relu"))

    def forward(self, values: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(values)))


def edge_copies(sequence: Ragged) -> Ragged:
    """Each sequence of L steps with 8 copies of its first step before it and copies of its last behind it, up to
    4 ceil(L / 4) + 16. Values [N, ...] of any kind: features, so that no frame is encoded twice, or frames.

    The lengths are asked of the device. ValueError for a sequence without steps.
    """
    lengths = sequence.lengths.tolist()
    if 0 in lengths:
        raise ValueError(f"sequence {lengths.index(0)} has no steps to copy")
    taken, start = [], 0
    copied = [4 * -(-length // 4) + 2 * COPIES for length in lengths]
    for length, longer in zip(lengths, copied, strict=True):
        taken.append(start + torch.arange(-COPIES, longer - COPIES).clamp(0, length - 1))
        start += length
    places = torch.cat(taken).to(sequence.values.device)
    return Ragged.from_lengths(sequence.values.index_select(0, places), copied)
