"""The settings of the models that frames go through, a branch of the configuration tree in ``config``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sltscale.settings import ActivationSettings, Positive, Settings, Share


class ResNetSettings(ActivationSettings):
    """A transformers ``ResNetModel``. pretrained: folder or hub name that weights and sizes are taken from."""

    pretrained: str | None = None
    embedding_size: Positive = 64
    hidden_sizes: tuple[Positive, ...] = (64, 128, 256, 512)
    depths: tuple[Positive, ...] = (2, 2, 2, 2)
    layer_type: Literal["basic", "bottleneck"] = "basic"


class TransformerSettings(ActivationSettings):
    """mBART-style blocks: learned positions, pre-norm, final norm."""

    layers: Positive = 3
    width: Positive = 512
    heads: Positive = 8
    feed_forward: Positive = 2048
    dropout: Share = 0.1
    activation: Literal["relu", "gelu"] = "relu"
    max_positions: Positive = 1024


class VisualSettings(Settings):
    """Frames to visual tokens: ResNet, temporal convolution (kernel, length kept), linear, transformer.

    norm: of ResNet and convolution; "batch" over the valid frames of the global batch (of a micro-batch on all ranks,
    where there are several), "frozen" as loaded, "layer" over each item by itself.
    """

    frames: ResNetSettings = ResNetSettings()
    kernel: Positive = 3
    norm: Literal["batch", "frozen", "layer"] = "batch"
    transformer: TransformerSettings = TransformerSettings()


class LocalTemporalSettings(Settings):
    """Linear, sine positions, blocks of local attention, down-sampling by 2, blocks, linear. The defaults are HFA's.

    norm_input: batch norm after the first linear layer. layers: blocks before and after the down-sampling. window:
    steps that a step sees, itself included. drop_path: rate of the last block, rising linearly from 0 at the first.
    layer_scale: first value of the learned factors on attention; scale_feed_forward: on the feed-forward part too
    (Sign2GPT). attention_dropout: of the attention weights (Sign2GPT 0.1). output_width: of a last linear layer, none
    leaves it out (Sign2GPT). attention: a backend of ``models/attention.py``, none for the first that can do it.

    padding "none": nothing depends on the rest of the batch. "reference": as both papers' code, whose sequences are
    padded with zeros to the longest; padded steps are left out as keys only, so that the first of them is averaged
    into a clip's last segment, and a clip of even length gets one segment more.
    """

    width: Positive = 512
    heads: Positive = 8
    feed_forward: Positive = 2048
    layers: tuple[Positive, Positive] = (2, 2)
    window: Positive = 7
    norm_input: bool = True
    dropout: Share = 0.1
    attention_dropout: Share = 0.0
    drop_path: Share = 0.1
    layer_scale: float = 1e-5
    scale_feed_forward: bool = False
    output_width: Positive | None = 1024
    attention: str | None = None
    padding: Literal["none", "reference"] = "none"

    @model_validator(mode="after")
    def _sizes_fit(self) -> LocalTemporalSettings:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not a multiple of twice its {self.heads} heads (rotary positions)")
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window} is even; a step sees as many steps before it as after it")
        return self


class LoraSettings(Settings):
    """Low-rank adapters (arXiv 2106.09685): the product of two matrices, times alpha / rank, is added to a frozen
    linear layer. dropout: of their input. rank 0: no adapters, the weights themselves learn, as small models want it
    that start from nothing."""

    rank: Annotated[int, Field(ge=0)]
    alpha: Annotated[float, Field(gt=0)]
    dropout: Share = 0.1


class DinoSettings(ActivationSettings):
    """A transformers ``Dinov2Model``, frozen but for LoRA in its last ``lora_blocks`` blocks; ViT-S/14 by default.

    image_size: edge of the images that its grid of positions was made for; frames of other sizes interpolate it.
    pretrained: folder or hub name that weights and sizes are taken from.
    """

    pretrained: str | None = None
    width: Positive = 384
    layers: Positive = 12
    heads: Positive = 6
    patch: Positive = 14
    image_size: Positive = 518
    lora_blocks: Annotated[int, Field(ge=0)] = 3
    lora: LoraSettings = LoraSettings(rank=4, alpha=4)


class HFAVisualSettings(Settings):
    """Frames to segments: DINOv2's class tokens, linear layer with batch norm, local attention over time."""

    frames: DinoSettings = DinoSettings()
    temporal: LocalTemporalSettings = LocalTemporalSettings()


class PackedTemporalSettings(Settings):
    """GFSLT-VLP's temporal convolutions, frames to a quarter as many visual tokens.

    sign_embedding: a linear layer with batch norm and ReLU behind the convolutions (GFSLT-VLP's translation stage).
    norm_over: the steps that batch norm takes its statistics over in training: the valid ones, or, as GFSLT-VLP's
    code, those of sequences padded with 1.0 to the longest.
    """

    width: Positive = 1024
    sign_embedding: bool = False
    norm_over: Literal["valid", "padded"] = "valid"


class PackedVisualSettings(Settings):
    """Frames to a quarter as many visual tokens (GFSLT-VLP): ResNet, temporal convolutions, transformer.

    edge_copies: what is repeated at a clip's ends, features, so that no frame is encoded twice, or frames, which the
    ResNet's batch norm then counts as often (GFSLT-VLP's code). norm: as in VisualSettings.
    """

    frames: ResNetSettings = ResNetSettings()
    edge_copies: Literal["features", "frames"] = "features"
    temporal: PackedTemporalSettings = PackedTemporalSettings()
    norm: Literal["batch", "frozen", "layer"] = "batch"
    transformer: TransformerSettings = TransformerSettings(width=1024, feed_forward=4096)

    def tokens(self, frames: int) -> int:
        """Visual tokens of a clip of that many frames."""
        return -(-frames // 4) + 1
