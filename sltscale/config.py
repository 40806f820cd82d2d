"""The whole typed configuration tree. Imports neither torch nor deepspeed: ``sltscale config`` answers at once."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class SyntheticSettings(Settings):
    """The embedded default corpus: drawn when the shards are missing."""

    clips: Positive
    seed: int = 0
    language: Literal["de", "en"] = "de"


class MixSettings(Settings):
    """A further corpus to train on. weight: how much more of it an epoch takes than its size alone would say."""

    shards: str
    weight: Annotated[float, Field(gt=0)] = 1.0


class DataSettings(Settings):
    """Which shards, and how a clip becomes frames.

    shards: folder made by tools/make_shards.py, with splits train, dev and test, or its https:// or s3:// address.
    mix: corpora whose train splits are added; an epoch takes of each a share by weight x clips^(1 / temperature).
    bad_data: what to do about clips that are not as they were indexed: stop before the first step, or skip them all,
    as long as they are no more than the share max_bad_share of a split.
    frame_size: height and width that clips are packed at. crop_size: even, window that the model sees (random in
    training, centre otherwise). sampling_rate: the share k of frames kept; one random frame of each of the
    int(k T) equal pieces in training, the first otherwise (C2RL section IV-B). max_frames: longest clip after
    sampling; longer ones are thinned evenly.

    A global batch holds at most ``global_batch`` clips, or ``global_frames`` frames counted as if every clip were
    padded to the longest, or both. bucket_window: clips of similar length go together, chosen from this many
    consecutive ones of the epoch's order; 0 takes them as they come. batch_multiple: with global_frames, numbers of
    clips are multiples of it, so that this many ranks get equal shares.
    """

    shards: str
    mix: tuple[MixSettings, ...] = ()
    temperature: Annotated[float, Field(ge=1)] = 1.0
    bad_data: Literal["stop", "skip"] = "stop"
    max_bad_share: Share = 0.01
    synthetic: SyntheticSettings | None = None
    frame_size: Positive
    crop_size: Positive
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_frames: Positive = 300
    augment: Literal["off", "light"] = "light"
    global_batch: Positive | None = None
    global_frames: Positive | None = None
    bucket_window: Annotated[int, Field(ge=0)] = 0
    batch_multiple: Positive = 1
    workers: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _some_batch_rule(self) -> DataSettings:
        if self.global_batch is None and self.global_frames is None:
            raise ValueError("neither global_batch nor global_frames is set")
        if self.global_frames is not None and not self.bucket_window:
            raise ValueError("global_frames needs bucket_window, e.g. 4096: batches of mixed lengths would waste it")
        return self

    @model_validator(mode="after")
    def _crop_fits(self) -> DataSettings:
        if self.crop_size > self.frame_size:
            raise ValueError(f"crop_size {self.crop_size} is larger than frame_size {self.frame_size}")
        if self.crop_size % 2:
            raise ValueError(f"crop_size {self.crop_size} is odd; stored clips hold one colour for 2 x 2 pixels")
        return self


class TextSettings(Settings):
    """tokenizer: "corpus" (a unigram model of ``vocabulary`` pieces learnt from the training sentences, kept in the
    run folder) or a local folder or hub name of a transformers tokenizer."""

    tokenizer: str = "corpus"
    vocabulary: Positive = 2000
    max_tokens: Positive = 128


class ResNetSettings(Settings):
    """A transformers ``ResNetModel``. pretrained: folder or hub name that weights and sizes are taken from."""

    pretrained: str | None = None
    embedding_size: Positive = 64
    hidden_sizes: tuple[Positive, ...] = (64, 128, 256, 512)
    depths: tuple[Positive, ...] = (2, 2, 2, 2)
    layer_type: Literal["basic", "bottleneck"] = "basic"


class TransformerSettings(Settings):
    """mBART-style blocks: learned positions, pre-norm, final norm."""

    layers: Positive = 3
    width: Positive = 512
    heads: Positive = 8
    feed_forward: Positive = 2048
    dropout: Share = 0.1
    activation: Literal["relu", "gelu"] = "relu"
    max_positions: Positive = 1024


class VisualSettings(Settings):
    """Frames to visual tokens: ResNet, temporal convolution (kernel, length kept), linear, transformer."""

    frames: ResNetSettings = ResNetSettings()
    kernel: Positive = 3
    transformer: TransformerSettings = TransformerSettings()


class C2RLSettings(Settings):
    """C2RL pretraining (arXiv 2408.09949): L = alpha L_con + beta L_lm."""

    name: Literal["c2rl"]
    visual: VisualSettings = VisualSettings()
    text_encoder: TransformerSettings = TransformerSettings()
    text_decoder: TransformerSettings = TransformerSettings()
    alpha: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Share = 0.2
    inner_temperature: Annotated[float, Field(gt=0)] = 0.07
    mask_inner: bool = True
    mix: Literal["sum2", "cico4"] = "sum2"
    max_logit_scale: Annotated[float, Field(gt=0)] = 100.0


class LanguageModelSettings(Settings):
    """An mBART-architecture encoder-decoder. pretrained: folder or hub name whose weights and sizes it takes.

    init_std: deviation of random weights. mBART's 0.02 is meant for a width of 1024; narrow models learn sooner with
    about 1 / sqrt(width).
    """

    pretrained: str | None = None
    width: Positive = 1024
    encoder_layers: Positive = 12
    decoder_layers: Positive = 12
    heads: Positive = 16
    feed_forward: Positive = 4096
    dropout: Share = 0.3
    attention_dropout: Share = 0.1
    activation: Literal["relu", "gelu"] = "gelu"
    max_positions: Positive = 1024
    init_std: Annotated[float, Field(gt=0)] = 0.02


class TranslationSettings(Settings):
    """Visual encoder, linear projection, mBART-architecture encoder-decoder, trained end to end."""

    name: Literal["translation"]
    visual: VisualSettings = VisualSettings()
    language_model: LanguageModelSettings = LanguageModelSettings()
    label_smoothing: Share = 0.2


MethodSettings = Annotated[C2RLSettings | TranslationSettings, Field(discriminator="name")]


class StartSettings(Settings):
    """Where the first weights come from: another recipe (trained first if its run is missing) or a run folder.

    parts: the submodules taken over; each must exist in both models with the same shapes.
    """

    recipe: str | None = None
    run: str | None = None
    parts: tuple[str, ...] = ("visual",)

    @model_validator(mode="after")
    def _one_source(self) -> StartSettings:
        if (self.recipe is None) == (self.run is None):
            raise ValueError("start needs either a recipe or a run")
        return self


class GroupSettings(Settings):
    """Learning rate of all parameters under one submodule, e.g. part = "language_model"."""

    part: str
    lr: Annotated[float, Field(ge=0)]


class OptimSettings(Settings):
    """name: sgd is SGD with momentum 0.9 and Nesterov. Weight decay spares biases and norms (1-D parameters).

    schedule cosine: per optimizer step from lr to min_lr after warmup_steps of linear warm-up.
    """

    name: Literal["sgd", "adam", "adamw"]
    lr: Annotated[float, Field(gt=0)]
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    groups: tuple[GroupSettings, ...] = ()


class TrainSettings(Settings):
    """Length of the run and how often it speaks and saves, in optimizer steps."""

    epochs: Positive
    log_every: Positive = 50
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2


class EvaluationSettings(Settings):
    """Decoding and scoring. convention: "13a" is sacrebleu's default; "slt" is the field's (tokenise none, floor)."""

    batch: Positive = 16
    beams: Positive = 5
    length_penalty: float = 1.0
    max_new_tokens: Positive = 100
    convention: Literal["13a", "slt"] = "13a"
    every_epochs: Positive | None = None
    samples: Annotated[int, Field(ge=0)] = 8


class Recipe(Settings):
    """One complete named run."""

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    start: StartSettings | None = None
    data: DataSettings
    text: TextSettings = TextSettings()
    method: MethodSettings
    optim: OptimSettings
    train: TrainSettings
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _lengths_fit(self) -> Recipe:
        """What is longer than a model's positions would only be found at the first long clip or sentence."""
        wanted: list[tuple[str, int, str, TransformerSettings | LanguageModelSettings]] = [
            ("data.max_frames", self.data.max_frames, "method.visual.transformer", self.method.visual.transformer)
        ]
        towers: dict[str, Any] = {}
        if isinstance(self.method, C2RLSettings):
            towers = {"text_encoder": self.method.text_encoder, "text_decoder": self.method.text_decoder}
        elif self.method.language_model.pretrained is None:
            language_model = self.method.language_model
            towers = {"language_model": language_model}
            wanted.append(("data.max_frames", self.data.max_frames, "method.language_model", language_model))
            generated = self.evaluation.max_new_tokens + 1  # the language code comes first
            wanted.append(("evaluation.max_new_tokens + 1", generated, "method.language_model", language_model))
        wanted += [("text.max_tokens", self.text.max_tokens, f"method.{name}", part) for name, part in towers.items()]
        for key, length, part, settings in wanted:
            if length > settings.max_positions:
                raise ValueError(f"{key} is {length}, more than {part}.max_positions {settings.max_positions}")
        return self

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
