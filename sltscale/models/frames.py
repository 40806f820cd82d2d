"""Frames to features: a ResNet over packed frames.

Letters: N packed frames, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from sltscale.config import ResNetSettings
from sltscale.errors import InputError
from sltscale.models.layers import use_global_batch_norm
from sltscale.models.memory import checkpoint_blocks
from sltscale.models.pretrained import load_pretrained
from sltscale.structures import Ragged

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FrameEncoder(nn.Module):
    """Ragged uint8 [N, 3 H / 2, W] (YUV 4:2:0, see VideoBatch) -> Ragged [N, width], one frame at a time.

    transformers' ResNetModel and global average pooling; batch norm statistics are those of the global batch. Frames
    become RGB of the parameters' dtype here, on the device, normalised by ImageNet's mean and deviation.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, settings: ResNetSettings) -> None:
        super().__init__()
        if settings.pretrained is not None:
            self.resnet = load_pretrained(ResNetModel, settings.pretrained)
        else:
            if len(settings.hidden_sizes) != len(settings.depths):
                raise InputError(
                    f"frames.hidden_sizes has {len(settings.hidden_sizes)} stages and frames.depths "
                    f"{len(settings.depths)}; expected one depth per stage"
                )
            self.resnet = ResNetModel(
                ResNetConfig(
                    embedding_size=settings.embedding_size,
                    hidden_sizes=list(settings.hidden_sizes),
                    depths=list(settings.depths),
                    layer_type=settings.layer_type,
                )
            )
        use_global_batch_norm(self.resnet)
        for module in self.resnet.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
        stages = self.resnet.encoder.stages
        checkpoint_blocks([self.resnet.embedder, *(block for stage in stages for block in stage.layers)], settings)
        self.width: int = self.resnet.config.hidden_sizes[-1]
        # channels_last is the faster layout for convolution, batch norm and pooling on CPU (1.4 to 1.8 times over all)
        # and on GPU tensor cores. With fewer than 16 channels the backward of a 1x1 convolution of stride 2 crashes in
        # it (segmentation fault in torch 2.13 on a CPU with AVX-512).
        narrowest = min(self.resnet.config.embedding_size, *self.resnet.config.hidden_sizes)
        self.memory_format = torch.channels_last if narrowest >= 16 else torch.contiguous_format
        # (x / 255 - mean) / std as one product and one sum
        mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, frames: Ragged) -> Ragged:
        pixels = frames.values
        if pixels.dtype != torch.uint8:
            raise TypeError(f"frames must be uint8, found {pixels.dtype}")
        features: Tensor = self.resnet(self._normalise(pixels)).pooler_output
        return frames.with_values(features.flatten(1))

    def _normalise(self, pixels: Tensor) -> Tensor:
        # In float32 whatever the model's dtype: bfloat16 would round shades away. The layout changes last, as torch's
        # CPU copy that changes dtype and layout at once is four times slower.
        dtype = next(self.resnet.parameters()).dtype
        values = yuv_to_rgb(pixels).mul_(self.scale.float()).add_(self.shift.float())
        return values.to(dtype).contiguous(memory_format=self.memory_format)


def yuv_to_rgb(frames: Tensor) -> Tensor:
    """uint8 [N, 3 H / 2, W] (planar YUV 4:2:0, see VideoBatch) -> float32 RGB [N, 3, H, W] from 0 to 255.

    ITU-R BT.601, limited range: Y from 16 to 235, U and V from 16 to 240 around 128. Each pixel takes the colour of its
    2 x 2 block.
    """
    count, rows, width = frames.shape
    height = rows * 2 // 3
    y, u, v = frames.flatten(1).split([height * width, height * width // 4, height * width // 4], 1)
    luma = (y.float() - 16).mul_(255 / 219).view(count, 1, height // 2, 2, width // 2, 2)
    u, v = ((plane.float() - 128).mul_(255 / 224) for plane in (u, v))
    colour = torch.stack([1.402 * v, -0.344136 * u - 0.714136 * v, 1.772 * u], 1)
    rgb = luma + colour.view(count, 3, height // 2, 1, width // 2, 1)
    return rgb.clamp_(0, 255).view(count, 3, height, width)
