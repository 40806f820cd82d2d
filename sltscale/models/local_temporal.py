"""Local attention over time: the temporal encoder of Sign2GPT and HFA (segment level) on packed sequences.

Letters: N packed steps (sum of lengths), B sequences, T longest, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sltscale.config import LocalTemporalSettings
from sltscale.models.attention import choose_backend, packed_attention
from sltscale.models.layers import GlobalBatchNorm
from sltscale.structures import Ragged


@dataclass(frozen=True)
class _Steps:
    """What the blocks of one resolution share. rotation: cos and sin of the rotary positions, [N, 1, D / 2] each.
    sequence_of_step: int64 [N]. attend: (query, key, value [N, H, D]) -> [N, H, D]."""

    rotation: tuple[Tensor, Tensor]
    sequence_of_step: Tensor
    sequences: int
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_backend(settings: LocalTemporalSettings, device: torch.device, dtype: torch.dtype) -> str:
    """What of ``models/attention.py`` attends in training; InputError if the settings name a backend that cannot."""
    return choose_backend(
        device,
        dtype,
        settings.width // settings.heads,
        window=settings.window,
        dropout=settings.attention_dropout,
        backend=settings.attention,
    )


class LocalTemporalEncoder(nn.Module):
    """Ragged [N, input_width] -> Ragged [N', output width], ceil(length / 2) segments of each sequence.

    ryanwongsa/Sign2GPT@5555935 models/metaformer; HFA (arXiv 2507.06732) adds the last linear layer and leaves the
    feed-forward part unscaled. Down-sampled steps are means of the (up to 3) steps around every second one; both codes
    divide by 3 also at a clip's ends, which padding "reference" repeats. Weights start as HFA's.
    """

    def __init__(self, input_width: int, settings: LocalTemporalSettings) -> None:
        super().__init__()
        self.settings = settings
        self.input = nn.Linear(input_width, settings.width)
        self.norm = GlobalBatchNorm(settings.width) if settings.norm_input else nn.Identity()
        before, after = settings.layers
        rates = [settings.drop_path * block / max(before + after - 1, 1) for block in range(before + after)]
        self.before = nn.ModuleList(_Block(settings, rate) for rate in rates[:before])
        self.after = nn.ModuleList(_Block(settings, rate) for rate in rates[before:])
        width = settings.output_width
        self.output = nn.Identity() if width is None else nn.Linear(settings.width, width)
        self.apply(_initialise)
        for block in (*self.before, *self.after):
            for parameter in block.attention_output.parameters():
                nn.init.normal_(parameter, std=0.02 / (2 * (before + after)) ** 0.5)

    def forward(self, sequence: Ragged) -> Ragged:
        embedded = sequence.with_values(self.norm(self.input(sequence.values)))
        if self.settings.padding == "none":
            segments = self.stages(embedded)[-1]
        else:
            padded, mask = self.padded_stages(*embedded.to_padded())[-1]
            segments = _ragged(padded[mask], mask.sum(1), padded.shape[1])
        return segments.with_values(self.output(segments.values))

    def stages(self, embedded: Ragged) -> list[Ragged]:
        """Embedded steps [N, C] with positions, after the first blocks, down-sampled, and after the last blocks."""
        table = sine_table(embedded.max_seqlen, embedded.values)
        positioned = embedded.with_values(embedded.values + table.index_select(0, positions(embedded)))
        first = self._run(self.before, positioned)
        halved = halve(first)
        return [positioned, first, halved, self._run(self.after, halved)]

    def padded_stages(self, embedded: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same as both papers' code has it, on padded steps [B, T, C] and mask bool [B, T]: (values, mask) after
        each. What stands at padded steps reaches valid ones."""
        positioned = embedded + sine_table(embedded.shape[1], embedded)
        first = self._run_padded(self.before, positioned, mask)
        halved = F.avg_pool1d(first.transpose(1, 2), 3, stride=2, padding=1).transpose(1, 2)
        segment_mask = F.max_pool1d(mask.float(), 3, stride=2, padding=1).bool()
        last = self._run_padded(self.after, halved, segment_mask)
        return [(positioned, mask), (first, mask), (halved, segment_mask), (last, segment_mask)]

    def _run(self, blocks: nn.ModuleList, sequence: Ragged) -> Ragged:
        settings = self.settings

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return packed_attention(
                query,
                key,
                value,
                sequence.cu_seqlens,
                sequence.max_seqlen,
                window=settings.window,
                dropout=settings.attention_dropout if self.training else 0.0,
                backend=settings.attention,
            )

        return sequence.with_values(self._run_blocks(blocks, sequence, attend))

    def _run_padded(self, blocks: nn.ModuleList, padded: Tensor, mask: Tensor) -> Tensor:
        count, longest = mask.shape
        steps = torch.arange(longest, device=mask.device)
        ahead = steps[None, :] - steps[:, None]
        # a padded step sees the valid ones beside it, and every step sees itself
        seen = (ahead.abs() <= self.settings.window // 2) & (mask[:, None, :] | (ahead == 0))

        def attend(*packed: Tensor) -> Tensor:
            query, key, value = (x.unflatten(0, (count, longest)).transpose(1, 2) for x in packed)
            dropout = self.settings.attention_dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None], dropout_p=dropout)
            return attended.transpose(1, 2).flatten(0, 1)

        sequence = Ragged.from_lengths(padded.flatten(0, 1), [longest] * count)
        return self._run_blocks(blocks, sequence, attend).view(padded.shape)

    def _run_blocks(
        self, blocks: nn.ModuleList, sequence: Ragged, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        values = sequence.values
        angles = rotary_angles(sequence.max_seqlen, self.settings.width // self.settings.heads, values)
        place = positions(sequence)
        rotation = angles.cos().index_select(0, place)[:, None], angles.sin().index_select(0, place)[:, None]
        steps = _Steps(rotation, _sequence_of_step(sequence), len(sequence), attend)
        for block in blocks:
            values = block(values, steps)
        return values


class _Block(nn.Module):
    """Post-norm: LN(x + scale * attention(x)), then LN(x + [scale *] feed-forward(x)), [N, C] -> [N, C]."""

    def __init__(self, settings: LocalTemporalSettings, drop_path: float) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.drop_path = settings.heads, drop_path
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_dropout = nn.Dropout(settings.dropout)
        self.attention_scale = nn.Parameter(torch.full((width,), settings.layer_scale))
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, settings.feed_forward),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.feed_forward, width),
        )
        scaled = settings.scale_feed_forward
        self.feed_forward_scale = nn.Parameter(torch.full((width,), settings.layer_scale)) if scaled else None
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, steps: _Steps) -> Tensor:
        query, key, value = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        attended = steps.attend(rotate(query, *steps.rotation), rotate(key, *steps.rotation), value)
        attended = self.attention_dropout(self.attention_output(attended.flatten(1)))
        x = self.attention_norm(x + self._dropped(self.attention_scale * attended, steps))
        fed = self.feed_forward(x)
        if self.feed_forward_scale is not None:
            fed = self.feed_forward_scale * fed
        output: Tensor = self.feed_forward_norm(x + self._dropped(fed, steps))
        return output

    def _dropped(self, branch: Tensor, steps: _Steps) -> Tensor:
        """Stochastic depth: the branch is left out of whole sequences."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(steps.sequences).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
        return branch * kept.index_select(0, steps.sequence_of_step)[:, None]


def positions(sequence: Ragged) -> Tensor:
    """int64 [N]: the place of each packed step in its sequence, from 0."""
    steps = torch.arange(sequence.values.shape[0], device=sequence.values.device)
    return steps - sequence.cu_seqlens.long().index_select(0, _sequence_of_step(sequence))


def halve(sequence: Ragged) -> Ragged:
    """Ragged [N, C] -> Ragged with ceil(length / 2) steps: step i is the mean of those of 2i - 1, 2i and 2i + 1 that
    the sequence has. How many there are is asked of the device."""
    place, lengths = positions(sequence), sequence.lengths.long()
    centres = (place % 2 == 0).nonzero()[:, 0]
    has_left = place[centres] > 0
    has_right = place[centres] + 1 < lengths.index_select(0, _sequence_of_step(sequence)[centres])
    values, total = sequence.values, len(sequence.values)
    summed = values.index_select(0, centres)
    for there, neighbours in ((has_left, centres - 1), (has_right, centres + 1)):
        summed = summed + values.index_select(0, neighbours.clamp(0, total - 1)) * there[:, None]
    count = 1 + has_left.to(values.dtype) + has_right.to(values.dtype)
    return _ragged(summed / count[:, None], (lengths + 1) // 2, (sequence.max_seqlen + 1) // 2)


def sine_table(length: int, like: Tensor) -> Tensor:
    """Fixed absolute positions [length, C] for values [..., C]: sines at even places, cosines at odd ones."""
    width, dtype = like.shape[-1], torch.promote_types(like.dtype, torch.float32)
    frequencies = 10000 ** -(torch.arange(0, width, 2, device=like.device, dtype=dtype) / width)
    angles = torch.arange(length, device=like.device, dtype=dtype)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width].to(like.dtype)


def rotary_angles(length: int, head_dim: int, like: Tensor) -> Tensor:
    """[length, head_dim / 2], at least float32 also for values in bfloat16, whose steps would be too coarse."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = 10000 ** -(torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim)
    return torch.arange(length, device=like.device, dtype=dtype)[:, None] * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: pair i of [N, H, D] is (x[i], x[D / 2 + i]), turned by its angle; cos and sin [N, 1, D / 2]."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _sequence_of_step(sequence: Ragged) -> Tensor:
    order = torch.arange(len(sequence), device=sequence.values.device)
    return order.repeat_interleave(sequence.lengths, output_size=sequence.values.shape[0])


def _ragged(values: Tensor, lengths: Tensor, max_seqlen: int) -> Ragged:
    """Packed under lengths that only the device knows."""
    return Ragged(values, F.pad(lengths.cumsum(0), (1, 0)).int(), max_seqlen)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
