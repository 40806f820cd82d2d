"""The settings of the models and methods, the largest branch of the configuration tree in ``config``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sltscale.language_settings import AnyLanguageModelSettings, LanguageModelSettings
from sltscale.settings import ActivationSettings, Length, Positive, Settings, Share


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


class SentenceEncoderSettings(TransformerSettings):
    """The encoder of an mBART. pretrained: folder or hub name of one whose encoder and sizes it takes."""

    pretrained: str | None = None


class TextEncoderSettings(SentenceEncoderSettings):
    """One of mBART-large's size."""

    layers: Positive = 12
    width: Positive = 1024
    heads: Positive = 16
    feed_forward: Positive = 4096
    dropout: Share = 0.3
    activation: Literal["relu", "gelu"] = "gelu"


class TextDecoderSettings(TransformerSettings):
    """Token embedding, mBART decoder blocks, output layer.

    pretrained: folder or hub name of an mBART that it starts from with ``start``: its token embedding and positions
    (GFSLT-VLP's light decoder), or its whole decoder, whose sizes it then takes (GFSLT-VLP's LLMD). tied: embedding
    and output layer are one matrix. init_std: as in LanguageModelSettings.
    """

    width: Positive = 1024
    feed_forward: Positive = 4096
    pretrained: str | None = None
    start: Literal["embeddings", "decoder"] = "embeddings"
    tied: bool = False
    init_std: Annotated[float, Field(gt=0)] = 0.02


class GFSLTVLPSettings(Settings):
    """GFSLT-VLP pretraining (arXiv 2307.14768): contrastive, and with masked_lm > 0 (version 2) the reconstruction of
    masked sentences, by a decoder that the other parts learn nothing from.

    group_size: each video is compared with the sentences of a group of at least so many clips out of the global batch
    (GFSLT-VLP: 4, what one of its GPUs holds), or with those of all (none). targets: see losses.contrastive.clip_loss.
    noise: which words of a sentence are masked (see data.noise); noise_rate: the largest share of them; shuffle_words:
    in one sentence of two their order is drawn too.
    """

    name: Literal["gfslt_vlp"]
    visual: PackedVisualSettings = PackedVisualSettings()
    text_encoder: TextEncoderSettings = TextEncoderSettings()
    text_decoder: TextDecoderSettings = TextDecoderSettings()
    group_size: Annotated[int, Field(ge=2)] | None = 4
    targets: Literal["one_hot", "softmax10"] = "softmax10"
    masked_lm: Annotated[float, Field(ge=0)] = 1.0
    noise: Literal["omit_last", "omit"] = "omit_last"
    noise_rate: Share = 0.15
    shuffle_words: bool = False
    label_smoothing: Share = 0.2

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        visual = self.visual.tokens(frames) + 1  # and the class token
        fitting = [("data.max_frames / 4 + 2", visual, "visual.transformer", self.visual.transformer.max_positions)]
        towers: list[tuple[str, TextEncoderSettings | TextDecoderSettings]] = [("text_encoder", self.text_encoder)]
        if self.masked_lm > 0:
            towers.append(("text_decoder", self.text_decoder))
        return fitting + [("text.max_tokens", tokens, name, tower.max_positions) for name, tower in towers]


class GFSLTSettings(Settings):
    """GFSLT (arXiv 2307.14768), end to end: visual tokens, transformer encoder, text decoder."""

    name: Literal["gfslt"]
    visual: PackedVisualSettings = PackedVisualSettings(temporal=PackedTemporalSettings(sign_embedding=True))
    text_decoder: TextDecoderSettings = TextDecoderSettings()
    label_smoothing: Share = 0.2

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        decoder = self.text_decoder.max_positions
        return [
            (
                "data.max_frames / 4 + 1",
                self.visual.tokens(frames),
                "visual.transformer",
                self.visual.transformer.max_positions,
            ),
            ("text.max_tokens", tokens, "text_decoder", decoder),
            ("evaluation.max_new_tokens + 1", generated, "text_decoder", decoder),
        ]


class TokenContrastSettings(Settings):
    """Of CLCL, see losses.contrastive. max_logit_scale: ceiling of the learned factor (CiCo 100); initial_temperature:
    1 / what it starts from (CiCo 0.01, the end of CLIP's training).

    group_size: as in GFSLTVLPSettings; C2RL leaves open whether its GPUs, with 8 clips each, compared theirs alone.
    special_tokens: </s> and language code are compared too, as CiCo's first and last token are.
    """

    group_size: Annotated[int, Field(ge=2)] | None = None
    special_tokens: bool = True
    initial_temperature: Annotated[float, Field(gt=0)] = 0.07
    inner_temperature: Annotated[float, Field(gt=0)] = 0.07
    mask_inner: bool = True
    mix: Literal["sum2", "cico4"] = "sum2"
    max_logit_scale: Annotated[float, Field(gt=0)] = 100.0


class C2RLSettings(TokenContrastSettings):
    """C2RL pretraining (arXiv 2408.09949): L = alpha L_con + beta L_lm.

    text_encoder: of another width than the visual tokens, it gets a linear layer behind it. share_embeddings: it has
    one token embedding with the decoder; tied: the decoder's embedding and output layer are one matrix.
    """

    name: Literal["c2rl"]
    visual: VisualSettings = VisualSettings()
    text_encoder: SentenceEncoderSettings = SentenceEncoderSettings()
    text_decoder: TransformerSettings = TransformerSettings()
    share_embeddings: bool = False
    tied: bool = False
    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Share = 0.2

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        towers = {"text_encoder": self.text_encoder, "text_decoder": self.text_decoder}
        if self.text_encoder.pretrained is not None:
            del towers["text_encoder"]
        return [
            ("data.max_frames", frames, "visual.transformer", self.visual.transformer.max_positions),
            *(("text.max_tokens", tokens, name, tower.max_positions) for name, tower in towers.items()),
        ]


class TranslationSettings(Settings):
    """Visual encoder, linear projection, language model, trained end to end.

    lora: the language model is frozen but for adapters in its linear layers that are called one of lora_modules (none:
    queries, keys, values and outputs of attention, by the model's own names for them). source_tokens: mBART's encoder
    reads </s> and the language code behind the video, as in MMTLB (arXiv 2203.04287).
    """

    name: Literal["translation"]
    visual: VisualSettings = VisualSettings()
    language_model: AnyLanguageModelSettings = LanguageModelSettings()
    lora: LoraSettings | None = None
    lora_modules: tuple[str, ...] = ()
    source_tokens: bool = False
    label_smoothing: Share = 0.2

    @model_validator(mode="after")
    def _has_source_tokens(self) -> TranslationSettings:
        if self.source_tokens and not isinstance(self.language_model, LanguageModelSettings):
            raise ValueError(f"source_tokens are mBART's, not of a language model {self.language_model.architecture}")
        return self

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        visual = ("data.max_frames", frames, "visual.transformer", self.visual.transformer.max_positions)
        key, read = ("data.max_frames + 2", frames + 2) if self.source_tokens else ("data.max_frames", frames)
        return [visual, *self.language_model.lengths(key, read, tokens, generated)]


class RetrievalSettings(TokenContrastSettings):
    """Retrieval on C2RL's visual tokens. encoder: of both the video's and the sentence's, with weights of their own."""

    name: Literal["retrieval"]
    visual: VisualSettings = VisualSettings()
    encoder: TextEncoderSettings = TextEncoderSettings()

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        visual = ("data.max_frames", frames, "visual.transformer", self.visual.transformer.max_positions)
        read = (("data.max_frames", frames), ("text.max_tokens", tokens))
        if self.encoder.pretrained is not None:
            return [visual]
        return [visual, *((key, length, "encoder", self.encoder.max_positions) for key, length in read)]


class FeatureSettings(Settings):
    """Trains nothing: writes the visual tokens of every clip, as evaluation sees it, as shards (C2RL section IV-B).

    visual: the encoder, whose weights come from ``start``. folder: where they go, for ``data.features`` of other
    recipes. dtype: as which they are stored. clips_per_shard: of which one rank writes all, at once or not at all.
    """

    name: Literal["features"]
    visual: VisualSettings = VisualSettings()
    folder: str
    dtype: Literal["float32", "float16"] = "float32"
    clips_per_shard: Positive = 250

    @model_validator(mode="after")
    def _written_here(self) -> FeatureSettings:
        if "://" in self.folder:
            raise ValueError(f"features cannot be written to {self.folder}; give a folder, and copy it there")
        return self

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        return [("data.max_frames", frames, "visual.transformer", self.visual.transformer.max_positions)]


class HFAPretrainingSettings(Settings):
    """HFA pretraining (arXiv 2507.06732): L = alignment L_align + pseudo_gloss L_pg. A weight of 0 leaves its part out.

    language_model: the one of the translation stage; its encoder reads the segments through LoRA, and a frozen second
    copy reads the sentences. pool_masked: a feature is the mean over valid positions; false takes padding in, as HFA's
    code. pool_cls: the position of the CLS token too (HFA's code: true).

    lexicon: folder made by sltscale lexicon build, or "corpus": the words of the training sentences as they stand.
    head_width: of the space of pseudo-glosses and vectors. tau_prototype, tau_time: temperatures of the softmax over
    prototypes and over steps, the first values if learn_temperatures. blank: a prototype for steps that mean nothing.
    loss "bce_logits": HFA's code, scores through a sigmoid once more and the blank among them.
    """

    name: Literal["hfa_pretraining"]
    visual: HFAVisualSettings = HFAVisualSettings()
    language_model: LanguageModelSettings = LanguageModelSettings()
    lora: LoraSettings = LoraSettings(rank=16, alpha=32)
    alignment: Annotated[float, Field(ge=0)] = 1.0
    pseudo_gloss: Annotated[float, Field(ge=0)] = 1.0
    pool_masked: bool = True
    pool_cls: bool = False
    lexicon: str = "corpus"
    head_width: Positive = 300
    head_dropout: Share = 0.2
    tau_prototype: Annotated[float, Field(ge=0.01, le=1)] = 0.1
    tau_time: Annotated[float, Field(ge=0.01, le=1)] = 0.1
    learn_temperatures: bool = False
    train_prototypes: bool = True
    blank: bool = True
    loss: Literal["bce", "bce_logits"] = "bce"

    @model_validator(mode="after")
    def _some_loss(self) -> HFAPretrainingSettings:
        if self.alignment == 0 and self.pseudo_gloss == 0:
            raise ValueError("alignment and pseudo_gloss are both 0; at least one loss must have a weight")
        return self

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        segments = (frames + 1) // 2 + 1  # and CLS
        return self.language_model.lengths("data.max_frames / 2 + 1", segments, tokens, generated)


class HFATranslationSettings(Settings):
    """HFA's translation stage: frozen mBART with LoRA (encoder, and self- and cross-attention of the decoder) on the
    segments. mapper: between the two, a linear layer, alone or with layer norm and GELU, or batch norm and ReLU."""

    name: Literal["hfa_translation"]
    visual: HFAVisualSettings = HFAVisualSettings()
    language_model: LanguageModelSettings = LanguageModelSettings()
    lora: LoraSettings = LoraSettings(rank=16, alpha=32)
    mapper: Literal["linear", "linear_ln_gelu", "linear_bn_relu"] = "linear_ln_gelu"
    label_smoothing: Share = 0.2

    def lengths(self, frames: int, tokens: int, generated: int) -> list[Length]:
        segments = (frames + 1) // 2 + 1  # and CLS
        return self.language_model.lengths("data.max_frames / 2 + 1", segments, tokens, generated)


MethodSettings = Annotated[
    C2RLSettings
    | TranslationSettings
    | GFSLTVLPSettings
    | GFSLTSettings
    | RetrievalSettings
    | FeatureSettings
    | HFAPretrainingSettings
    | HFATranslationSettings,
    Field(discriminator="name"),
]
