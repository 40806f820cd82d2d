"""Convolution over time on packed sequences.

Letters: N packed steps (sum of lengths), B sequences, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sltscale.models.layers import GlobalBatchNorm
from sltscale.structures import Ragged


class TemporalConvolution(nn.Module):
    """Ragged [N, C] -> Ragged [N, C]: convolution of length ``kernel`` that keeps the length, batch norm, ReLU
    (C2RL table I).

    Each sequence sees zeros beyond its ends. The sequences are laid in one row with kernel // 2 zeros between them, so
    no step is computed that is not there, none leaks into a neighbour, and the norm counts valid steps only. Without a
    bias: the norm would subtract it again.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, bias=False)
        self.norm = GlobalBatchNorm(width)

    def forward(self, sequence: Ragged) -> Ragged:
        values, gap, kernel = sequence.values, self.conv.kernel_size[0] // 2, self.conv.kernel_size[0]
        steps, count = values.shape[0], len(sequence)
        clips = torch.arange(count, device=values.device)
        clip_of_step = clips.repeat_interleave(sequence.lengths, output_size=steps)
        place = torch.arange(steps, device=values.device) + gap * (clip_of_step + 1)
        row = values.new_zeros(steps + gap * (count + 1), values.shape[1]).index_copy(0, place, values)
        convolved = self.conv(row.T[None])[0].T
        # an even kernel looks one step less far back than ahead, as torch's padding="same"
        centred = convolved.index_select(0, place - (kernel - 1) // 2)
        return sequence.with_values(F.relu(self.norm(centred)))
