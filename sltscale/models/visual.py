"""Frames to visual tokens: frame encoder, temporal convolution, transformer.

Letters: B clips, N packed frames, M visual tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sltscale.config import PackedVisualSettings, VisualSettings
from sltscale.errors import InputError
from sltscale.models.frames import FrameEncoder
from sltscale.models.language import TransformerEncoder
from sltscale.models.layers import choose_norm
from sltscale.models.packed_temporal import PackedTemporalEncoder, edge_copies
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
        choose_norm(self, settings.norm)

    def forward(self, frames: Ragged) -> Ragged:
        steps = self.temporal(self.frames(frames))
        packed = steps.with_values(self.linear(steps.values))
        padded, mask = packed.to_padded()
        return Ragged.from_padded(self.transformer(padded, mask), mask, like=packed)


class StoredTokens(nn.Module):
    """In the place of a visual encoder whose tokens are read from files: Ragged [N, width] as it comes, in the model's
    own floating-point type."""

    like: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("like", torch.zeros(()), persistent=False)  # goes where the parameters go

    def forward(self, tokens: Ragged) -> Ragged:
        return tokens.with_values(tokens.values.to(self.like.dtype))


class PackedVisualTokens(nn.Module):
    """Ragged uint8 [N, 3 H / 2, W] -> Ragged [M, width]: ceil(frames / 4) + 1 visual tokens a clip, also of a single
    frame (GFSLT-VLP, zhoubenjia/GFSLT-VLP@91ba953 models.py): frame encoder and temporal convolutions."""

    def __init__(self, settings: PackedVisualSettings) -> None:
        super().__init__()
        if settings.temporal.width != settings.transformer.width:
            raise InputError(
                f"method.visual.temporal.width is {settings.temporal.width}, method.visual.transformer.width "
                f"{settings.transformer.width}; there is no layer between the two: set both to the same number"
            )
        self.width = settings.temporal.width
        self.edge_copies = settings.edge_copies
        self.frames = FrameEncoder(settings.frames)
        self.temporal = PackedTemporalEncoder(self.frames.width, settings.temporal)
        choose_norm(self, settings.norm)

    def forward(self, frames: Ragged) -> Ragged:
        if self.edge_copies == "frames":
            return self.temporal.tokens(self.frames(edge_copies(frames)))
        tokens: Ragged = self.temporal(self.frames(frames))
        return tokens


class PackedVisualEncoder(PackedVisualTokens):
    """Ragged uint8 [N, 3 H / 2, W] -> [B, D]: a learned class token before each clip's visual tokens, transformer, what
    became of the class token (GFSLT-VLP's pretraining)."""

    def __init__(self, settings: PackedVisualSettings) -> None:
        super().__init__(settings)
        self.class_token = nn.Parameter(torch.randn(1, self.width))
        self.transformer = TransformerEncoder(settings.transformer)

    def forward(self, frames: Ragged) -> Tensor:  # type: ignore[override]
        padded, mask = super().forward(frames).to_padded()
        first = self.class_token.to(padded.dtype).expand(len(padded), 1, -1)
        tokens, mask = torch.cat([first, padded], 1), torch.nn.functional.pad(mask, (1, 0), value=True)
        encoded: Tensor = self.transformer(tokens, mask)
        return encoded[:, 0]
