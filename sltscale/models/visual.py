"""Frames to visual tokens: frame encoder, temporal convolution, linear layer, transformer.

Letters: N packed frames, D width.
"""

from __future__ import annotations

from torch import nn

from sltscale.config import VisualSettings
from sltscale.models.frames import FrameEncoder
from sltscale.models.language import TransformerEncoder
from sltscale.models.temporal import TemporalConvolution
from sltscale.structures import Ragged


class VisualEncoder(nn.Module):
    """Ragged uint8 [N, 3 H / 2, W] -> Ragged [N, width] (C2RL table I): one visual token per frame."""

    def __init__(self, settings: VisualSettings) -> None:
        super().__init__()
        self.width = settings.transformer.width
        self.frames = FrameEncoder(settings.frames)
        self.temporal = TemporalConvolution(self.frames.width, settings.kernel)
        self.linear = nn.Linear(self.frames.width, self.width)
        self.transformer = TransformerEncoder(settings.transformer)

    def forward(self, frames: Ragged) -> Ragged:
        steps = self.temporal(self.frames(frames))
        packed = steps.with_values(self.linear(steps.values))
        padded, mask = packed.to_padded()
        return Ragged.from_padded(self.transformer(padded, mask), mask, like=packed)
