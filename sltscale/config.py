"""The whole typed configuration tree. Imports neither torch nor deepspeed: ``sltscale config`` answers at once."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sltscale.language_settings import (  # noqa: F401
    AnyLanguageModelSettings,
    CausalSettings,
    LanguageModelSettings,
    MT5Settings,
)
from sltscale.method_settings import (  # noqa: F401 - the whole tree can be had from here
    C2RLSettings,
    ComparisonSettings,
    FeatureSettings,
    GFSLTSettings,
    GFSLTVLPSettings,
    HFAPretrainingSettings,
    HFATranslationSettings,
    MethodSettings,
    RetrievalSettings,
    SentenceEncoderSettings,
    TextDecoderSettings,
    TextEncoderSettings,
    TokenContrastSettings,
    TranslationSettings,
)
from sltscale.settings import ActivationSettings, Positive, Settings, Share  # noqa: F401
from sltscale.visual_settings import (  # noqa: F401
    DinoSettings,
    HFAVisualSettings,
    LocalTemporalSettings,
    LoraSettings,
    PackedTemporalSettings,
    PackedVisualSettings,
    ResNetSettings,
    TransformerSettings,
    VisualSettings,
)


class SyntheticSettings(Settings):
    """The embedded default corpus: drawn when the shards are missing."""

    clips: Positive
    seed: int = 0
    language: Literal["de", "en"] = "de"


class MixSettings(Settings):
    """A further corpus to train on. weight: how much more of it an epoch takes than its size alone would say."""

    shards: str
    weight: Annotated[float, Field(gt=0)] = 1.0


Augment = Literal["off", "light", "strong", "strong_color"]


class DataSettings(Settings):
    """Which shards, and how a clip becomes frames.

    shards: folder made by tools/make_shards.py, with splits train, dev and test, or its https:// or s3:// address.
    features: folder of the visual tokens of these shards' clips, as a recipe of method "features" writes it; they are
    read in place of the clips, and the visual encoder neither runs nor learns (frames are tokens, then).
    mix: corpora whose train splits are added; an epoch takes of each a share by weight x clips^(1 / temperature).
    bad_data: what to do about clips that are not as they were indexed: stop before the first step, or skip them all,
    as long as they are no more than the share max_bad_share of a split.
    frame_size: height and width that clips are packed at. crop_size: even, window that the model sees (random in
    training, centre otherwise). sampling_rate: the share k of frames kept; one random frame of each of the
    int(k T) equal pieces in training, the first otherwise (C2RL section IV-B). max_frames: longest clip after
    sampling; longer ones are thinned evenly. augment "off": nothing is random, training sees what evaluation sees;
    "light": frames and window; "strong": besides, pictures are turned, resized and moved; "strong_color": or, and also,
    of another brightness and saturation (data/batches/vidaug.py). temporal_rescale: training plays a clip faster or
    slower by up to this share, 0.2 in GFSLT-VLP's code; with global_batch alone, the other rules count frames before.

    A global batch holds at most ``global_batch`` clips, or ``global_frames`` frames counted as if every clip were
    padded to the longest, or both. bucket_window: clips of similar length go together, chosen from this many
    consecutive ones of the epoch's order; 0 takes them as they come. batch_multiple: with global_frames, numbers of
    clips are multiples of it, so that this many ranks get equal shares. micro_frames: what fits into memory; a rank's
    share of a batch goes through the model in parts of at most so many frames, as many as it takes. shuffle false:
    every epoch takes the clips as they stand in the shards' index (HFA's code: as its annotation file has them).
    """

    shards: str
    features: str | None = None
    mix: tuple[MixSettings, ...] = ()
    temperature: Annotated[float, Field(ge=1)] = 1.0
    bad_data: Literal["stop", "skip"] = "stop"
    max_bad_share: Share = 0.01
    synthetic: SyntheticSettings | None = None
    frame_size: Positive
    crop_size: Positive
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_frames: Positive = 300
    augment: Augment = "light"
    temporal_rescale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    global_batch: Positive | None = None
    global_frames: Positive | None = None
    bucket_window: Annotated[int, Field(ge=0)] = 0
    batch_multiple: Positive = 1
    micro_frames: Positive | None = None
    shuffle: bool = True
    workers: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _some_batch_rule(self) -> DataSettings:
        if self.global_batch is None and self.global_frames is None:
            raise ValueError("neither global_batch nor global_frames is set")
        if self.global_frames is not None and not self.bucket_window:
            raise ValueError("global_frames needs bucket_window, e.g. 4096: batches of mixed lengths would waste it")
        if not self.shuffle and (self.bucket_window or self.mix):
            raise ValueError("shuffle is false, but bucket_window and mix draw an order of their own; unset them")
        return self

    @model_validator(mode="after")
    def _rescaling_fits(self) -> DataSettings:
        if self.temporal_rescale and self.augment == "off":
            raise ValueError(f'temporal_rescale is {self.temporal_rescale}, but augment "off"; set one of the two')
        if self.temporal_rescale and not (self.global_frames is None and self.micro_frames is None):
            raise ValueError("temporal_rescale changes the frames that global_frames and micro_frames count; unset it")
        return self

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> DataSettings:
        # With room for any two clips, a batch can always be dealt into parts that are not empty.
        if self.micro_frames is not None and self.micro_frames < 2 * self.max_frames:
            raise ValueError(f"micro_frames {self.micro_frames} is less than twice max_frames {self.max_frames}")
        return self

    @model_validator(mode="after")
    def _nothing_random_in_features(self) -> DataSettings:
        if self.features is not None and self.augment != "off":
            raise ValueError(f'features are read as they are stored, and augment is "{self.augment}"; set it to "off"')
        if self.features is not None and self.mix:
            raise ValueError("features are of one corpus; set mix or features to none")
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


class StartSettings(Settings):
    """Where the first weights come from: another recipe (trained first if its run is missing) or a run folder.

    parts: the submodules taken over, "NAME", or "NAME -> OWN NAME" where this model calls it otherwise; each must exist
    in both models with the same shapes. fresh: submodules and parameters inside these, by this model's names, that
    keep the weights they were drawn with.
    """

    recipe: str | None = None
    run: str | None = None
    parts: tuple[str, ...] = ("visual",)
    fresh: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> StartSettings:
        if (self.recipe is None) == (self.run is None):
            raise ValueError("start needs either a recipe or a run")
        return self


Algorithm = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "cosine_epoch", "one_cycle"]


class OneCycleSettings(Settings):
    """As torch's OneCycleLR: the rate goes from lr / start_divisor up to lr in the first ``warmup_share`` of all steps,
    then down to lr / start_divisor / end_divisor in the last one, each on half a cosine. momentum: lowest and highest
    value of what goes the other way, SGD's momentum or Adam's first beta; none leaves it as it is."""

    warmup_share: Share = 0.3
    start_divisor: Annotated[float, Field(gt=0)] = 25.0
    end_divisor: Annotated[float, Field(gt=0)] = 1e4
    momentum: tuple[Share, Share] | None = (0.85, 0.95)


class GroupSettings(Settings):
    """A rule for some parameters; the first rule that a parameter matches is its own.

    part: a submodule or parameter ("language_model.model.encoder"), or a pattern for such ("*.encoder.layers.[0-5]").
    only: among these only LoRA matrices, or only norms and biases (all 1-D parameters). frozen: not trained; modules
    without a trained parameter run in evaluation mode. period: steps from one update to the next, counted from the
    start of each epoch; in between, weights and optimizer state stay and the gradient is dropped.

    The rest means what it means in optim and is taken from there if not given. weight_decay in a rule with
    only = "norm_bias" applies to them.
    """

    part: str
    only: Literal["lora", "norm_bias"] | None = None
    frozen: bool = False
    period: Positive = 1
    name: Algorithm | None = None
    lr: Annotated[float, Field(ge=0)] | None = None
    betas: tuple[float, float] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    schedule: Schedule | None = None
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    min_lr: Annotated[float, Field(ge=0)] | None = None
    one_cycle: OneCycleSettings | None = None

    @model_validator(mode="after")
    def _frozen_says_all(self) -> GroupSettings:
        others = self.model_fields_set - {"part", "only", "frozen"}
        given = sorted(name for name in others if getattr(self, name) != type(self).model_fields[name].default)
        if self.frozen and given:
            raise ValueError(f"{self.part} is frozen and sets {', '.join(given)}; remove one of the two")
        return self


class OptimSettings(Settings):
    """name: sgd is SGD with momentum 0.9 and Nesterov. Weight decay spares biases and norms (1-D parameters).

    schedule: "cosine" per optimizer step from lr to min_lr after warmup_steps of linear warm-up; "cosine_epoch" the
    same per epoch, as timm and torch step it (epochs 0 and 1 both at lr), without warm-up; "one_cycle" per step;
    "constant" after warm-up. clip_norm: highest global L2 norm of the gradients of all parameters that the step
    updates, or none.
    """

    name: Algorithm
    lr: Annotated[float, Field(gt=0)]
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Schedule = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    one_cycle: OneCycleSettings = OneCycleSettings()
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    groups: tuple[GroupSettings, ...] = ()

    def of_group(self, group: GroupSettings) -> OptimSettings:
        """What holds for the parameters of ``group``: its own values, for the rest these."""
        own = {name: value for name, value in group if name in type(self).model_fields and value is not None}
        return self.model_copy(update={**own, "groups": ()})

    @model_validator(mode="after")
    def _schedules_fit(self) -> OptimSettings:
        everyone = [("", self), *((f"{group.part}: ", self.of_group(group)) for group in self.groups)]
        for where, settings in everyone:
            if settings.warmup_steps and settings.schedule in ("cosine_epoch", "one_cycle"):
                raise ValueError(
                    f"{where}warmup_steps {settings.warmup_steps} does not go with {settings.schedule}; set it to 0"
                )
            if settings.min_lr and settings.min_lr > settings.lr:
                raise ValueError(f"{where}min_lr {settings.min_lr} is above lr {settings.lr}; set both")
        return self


class BestSettings(Settings):
    """A score on the dev split, by its name in metrics.json, e.g. "bleu4" or "t2v_recall@1"; whether more is better."""

    score: str
    mode: Literal["max", "min"] = "max"


class TrainSettings(Settings):
    """Length of the run and how often it speaks and saves, in optimizer steps.

    keep_best: the checkpoint with the best score among those of evaluation.every_epochs, and the last, stays beside the
    newest keep_checkpoints. select: which one the run ends in. max_skipped: a step whose loss or gradient is not finite
    is skipped; after so many in a row the run stops. watchdog_seconds: a step, or the start-up, that takes longer is
    taken for a hang. attention: what language models attend by in training (docs/attention.md), none for the fastest
    there is.
    """

    epochs: Positive
    log_every: Positive = 50
    checkpoint_every: Positive = 500
    keep_checkpoints: Positive = 2
    keep_best: BestSettings | None = None
    select: Literal["last", "best"] = "last"
    max_skipped: Positive = 5
    watchdog_seconds: Annotated[float, Field(gt=0)] = 1800.0
    attention: str | None = None

    @model_validator(mode="after")
    def _best_of_what(self) -> TrainSettings:
        if self.select == "best" and self.keep_best is None:
            raise ValueError('select is "best", but keep_best names no score')
        return self


class SamplingSettings(Settings):
    """Sentences drawn from the model's probabilities, those of each step sharpened by a temperature below 1; only the
    likeliest tokens that make up top_p of them are drawn from."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class EvaluationSettings(Settings):
    """Decoding and scoring. sampling: in place of beam search; what is drawn for a clip depends on the seed and its id
    alone. convention: "13a" is sacrebleu's default; "slt" is the field's (tokenise none, floor).
    append_period: score every sentence with " ." behind it, as HFA's code. bleurt: folder or hub name of a checkpoint,
    which adds BLEURT to the scores of translations (docs/evaluation.md)."""

    batch: Positive = 16
    beams: Positive = 5
    length_penalty: float = 1.0
    max_new_tokens: Positive = 100
    sampling: SamplingSettings | None = None
    convention: Literal["13a", "slt"] = "13a"
    append_period: bool = False
    bleurt: str | None = None
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
    def _features_have_an_encoder(self) -> Recipe:
        method, features = self.method, self.data.features
        if isinstance(method, FeatureSettings):
            if features is not None or self.data.mix or self.data.augment != "off":
                raise ValueError(
                    'method features reads the clips of data.shards as evaluation does; set data.augment to "off", '
                    "data.features and data.mix to none"
                )
        elif features is not None:
            if not isinstance(method, TranslationSettings | RetrievalSettings):
                raise ValueError(f"data.features are for methods translation and retrieval, not {method.name}")
            if self.start is None:
                raise ValueError("data.features needs start, where the encoder that wrote them is found")
        return self

    def on_video(self) -> Recipe:
        """The recipe of the whole model, which has a visual encoder and reads clips: without data.features."""
        return self.model_copy(update={"data": self.data.model_copy(update={"features": None})})

    @model_validator(mode="after")
    def _best_is_looked_for(self) -> Recipe:
        if self.train.keep_best is not None and self.evaluation.every_epochs is None:
            raise ValueError("train.keep_best needs scores to compare: set evaluation.every_epochs, e.g. 1")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Recipe:
        """What is longer than a model's positions would only be found at the first long clip or sentence."""
        generated = self.evaluation.max_new_tokens + 1  # the language code comes first
        for key, length, part, positions in self.method.lengths(self.data.max_frames, self.text.max_tokens, generated):
            if length > positions:
                raise ValueError(f"{key} is {length}, more than method.{part}.max_positions {positions}")
        return self

    @property
    def prompts(self) -> dict[str, str] | None:
        """How the model is told a sentence's language, see data.text.TextTokenizer."""
        return getattr(getattr(self.method, "language_model", None), "prompts", None)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
