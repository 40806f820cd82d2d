"""Frames to features: DINOv2, frozen, with low-rank adapters in its last blocks.

Letters: N packed frames, P patches and the class token, C width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from sltscale.config import DinoSettings
from sltscale.errors import InputError
from sltscale.models.frames import IMAGENET_MEAN, IMAGENET_STD, yuv_to_rgb
from sltscale.models.lora import add_lora
from sltscale.models.memory import checkpoint_blocks
from sltscale.models.pretrained import load_pretrained
from sltscale.structures import Ragged

LORA_STD = 0.02  # of the adapters' first matrix, ryanwongsa/Sign2GPT@5555935 attention.py and mlp.py


class DinoEncoder(nn.Module):
    """Ragged uint8 [N, 3 H / 2, W] (YUV 4:2:0, see VideoBatch) -> Ragged [N, width]: each frame's class token after the
    final norm.

    Adapters sit on the joint query-key-value, output and feed-forward layers of the last blocks (Sign2GPT, HFA). Height
    and width are multiples of the patch size; InputError otherwise, and if sizes do not fit together.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, settings: DinoSettings) -> None:
        super().__init__()
        if settings.pretrained is not None:
            self.dino = load_pretrained(Dinov2Model, settings.pretrained)
        else:
            if settings.width % settings.heads:
                raise InputError(f"frames.width {settings.width} is not a multiple of its {settings.heads} heads")
            self.dino = Dinov2Model(
                Dinov2Config(
                    hidden_size=settings.width,
                    num_hidden_layers=settings.layers,
                    num_attention_heads=settings.heads,
                    image_size=settings.image_size,
                    patch_size=settings.patch,
                )
            )
        config = self.dino.config
        self.width: int = config.hidden_size
        self.patch: int = config.patch_size
        layers = config.num_hidden_layers
        if settings.lora_blocks > layers:
            raise InputError(f"frames.lora_blocks is {settings.lora_blocks}, but the model has {layers} blocks")
        self.dino.requires_grad_(False)
        checkpoint_blocks(self.dino.encoder.layer, settings)
        for block in self.dino.encoder.layer[layers - settings.lora_blocks :]:
            block.attention = _JointAttention(block.attention)
            add_lora(block, settings.lora, r"attention\.(qkv|o_proj)|mlp\.fc[12]")
            for name, parameter in block.named_parameters():
                if ".lora_A." in name:
                    nn.init.normal_(parameter, std=LORA_STD)
        # (x / 255 - mean) / std as one product and one sum
        mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, frames: Ragged) -> Ragged:
        pixels = frames.values
        if pixels.dtype != torch.uint8:
            raise TypeError(f"frames must be uint8, found {pixels.dtype}")
        height, width = pixels.shape[1] * 2 // 3, pixels.shape[2]
        if height % self.patch or width % self.patch:
            raise InputError(
                f"frames are {width} x {height}, DINOv2 cuts them into patches of {self.patch}; set data.crop_size to "
                f"a multiple of it, e.g. {max(1, height // self.patch) * self.patch}"
            )
        # In float32 whatever the model's dtype: bfloat16 would round shades away.
        values = yuv_to_rgb(pixels).mul_(self.scale.float()).add_(self.shift.float())
        tokens: Tensor = self.dino(values.to(self.dino.layernorm.weight.dtype)).pooler_output
        return frames.with_values(tokens)


class _JointAttention(nn.Module):
    """A block's attention with query, key and value as one linear layer, as DINOv2's own code has it: an adapter of
    it has one input matrix for the three. [N, P, C] -> [N, P, C]."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads: int = attention.num_attention_heads
        self.qkv = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts), device="meta")
        self.qkv.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
        self.qkv.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
        self.o_proj = attention.o_proj

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output, None
