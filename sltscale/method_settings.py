"""The settings of the methods and of their text models, the largest branch of the configuration tree in ``config``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sltscale.language_settings import AnyLanguageModelSettings, LanguageModelSettings
from sltscale.settings import Length, Positive, Settings, Share
from sltscale.visual_settings import (
    HFAVisualSettings,
    LoraSettings,
    PackedTemporalSettings,
    PackedVisualSettings,
    TransformerSettings,
    VisualSettings,
)


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


class ComparisonSettings(Settings):
    """What a contrastive loss compares.

    group_size: each video is compared with the sentences of a group of at least so many clips out of the global batch,
    whatever the ranks hold, or with those of all (none). duplicates: what another clip's sentence that reads the same
    as a video's own is to it, also on other ranks.
    """

    group_size: Annotated[int, Field(ge=2)] | None = None
    duplicates: Literal["negatives", "positives"] = "negatives"


class GFSLTVLPSettings(ComparisonSettings):
    """GFSLT-VLP pretraining (arXiv 2307.14768): contrastive, and with masked_lm > 0 (version 2) the reconstruction of
    masked sentences, by a decoder that the other parts learn nothing from.

    group_size: by default 4, what one of GFSLT-VLP's GPUs holds. targets: see losses.contrastive.clip_loss.
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


class TokenContrastSettings(ComparisonSettings):
    """Of CLCL, see losses.contrastive. max_logit_scale: ceiling of the learned factor (CiCo 100); initial_temperature:
    1 / what it starts from (CiCo 0.01, the end of CLIP's training).

    special_tokens: </s> and language code are compared too, as CiCo's first and last token are.
    """

    special_tokens: bool = True
    initial_temperature: Annotated[float, Field(gt=0)] = 0.07
    inner_temperature: Annotated[float, Field(gt=0)] = 0.07
    mask_inner: bool = True
    mix: Literal["sum2", "cico4"] = "sum2"
    max_logit_scale: Annotated[float, Field(gt=0)] = 100.0


class C2RLSettings(TokenContrastSettings):
    """C2RL pretraining (arXiv 2408.09949): L = alpha L_con + beta L_lm.

    text_encoder: of another width than the visual tokens, it gets a linear layer behind it. share_embeddings: it has
    one token embedding with the decoder, which is kept with the encoder, so that another such run starts from both with
    start.fresh = ["text_decoder.blocks.embed_tokens"]; tied: the decoder's embedding and output layer are one matrix.
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


class HFAPretrainingSettings(ComparisonSettings):
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
