"""The whole typed configuration tree, and how a recipe file becomes one.

A recipe (``sltscale/recipes/*.toml`` or any TOML file) is one complete named run, with at most one ``base``. The
command line tunes single values (``--optim.lr 1e-4``). Unknown keys are refused with the nearest valid names.
Imports neither torch nor deepspeed, so that ``sltscale config`` answers at once.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sltscale.errors import InputError

RECIPES = Path(__file__).parent / "recipes"


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class SyntheticSettings(Settings):
    """The embedded default corpus: drawn when the shards are missing."""

    clips: Positive
    seed: int = 0
    language: Literal["de", "en"] = "de"


class DataSettings(Settings):
    """Which shards, and how a clip becomes frames.

    shards: folder made by tools/make_shards.py, with splits train, dev and test.
    frame_size: height and width that clips are packed at. crop_size: window that the model sees (random in
    training, centre otherwise). sampling_rate: the share k of frames kept; one random frame of each of the
    int(k T) equal pieces in training, the first otherwise (C2RL section IV-B). max_frames: longest clip after
    sampling; longer ones are thinned evenly.
    """

    shards: str
    synthetic: SyntheticSettings | None = None
    frame_size: Positive
    crop_size: Positive
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_frames: Positive = 300
    augment: Literal["off", "light"] = "light"
    global_batch: Positive
    workers: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _crop_fits(self) -> DataSettings:
        if self.crop_size > self.frame_size:
            raise ValueError(f"crop_size {self.crop_size} is larger than frame_size {self.frame_size}")
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


def recipe_names() -> list[str]:
    """Files whose name starts with an underscore are bases for others, no recipes."""
    return sorted(path.stem for path in RECIPES.glob("[!_]*.toml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name (or in that TOML file) with command-line overrides ``["--optim.lr", "1e-4", ...]``.

    Raises InputError in one line for an unknown recipe, key or value, with the nearest valid names.
    """
    path = _recipe_path(name_or_path)
    tree = _read_toml(path)
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"recipe {name_or_path}: base: expected a recipe name or TOML file, found {base!r}")
        base_tree = _read_toml(_recipe_path(str(path.parent / base) if base.endswith(".toml") else base))
        if "base" in base_tree:
            raise InputError(
                f"recipe {name_or_path}: its base {base} has a base itself; a recipe may have one base only"
            )
        tree = _merge(base_tree, tree)
    for key, value in _parse_overrides(overrides):
        _set(tree, key, value)
    return _validate(tree, f"recipe {name_or_path}")


def recipe_from_json(text: str, where: str) -> Recipe:
    """A resolved recipe as stored in a run folder; InputError names ``where`` if it is not one."""
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not a stored configuration ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{where}: not a stored configuration (found {type(tree).__name__}, expected an object)")
    return _validate(tree, where)


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """Fields whose values differ, as "optim.lr 0.001 (run) / 0.01 (asked)"."""
    a, b = _flatten(ours.model_dump(mode="json")), _flatten(theirs.model_dump(mode="json"))
    missing = object()
    return [
        f"{key} {a.get(key, '-')} (run) / {b.get(key, '-')} (asked)"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def _recipe_path(name_or_path: str) -> Path:
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"recipe file {name_or_path} does not exist")
        return path
    path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file() or path.parent != RECIPES:
        raise InputError(f"unknown recipe {name_or_path!r}; {nearest(name_or_path, recipe_names())}")
    return path


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def _parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            raise InputError(f"unexpected argument {option!r}; expected --key value, e.g. --optim.lr 1e-4")
        key, equals, value = option[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"{option}: no value given; expected {option} VALUE")
            value = rest.pop(0)
        pairs.append((key, _parse_value(value)))
    return pairs


def _parse_value(text: str) -> Any:
    """A TOML value where it is one (1e-4, true, [1, 2]), ``none`` for no value, a plain string otherwise."""
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = tree.get(parent)
        tree[parent] = child if isinstance(child, dict) else {}
        tree = tree[parent]
    tree[last] = value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        mergeable = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if mergeable else value
    return merged


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def nearest(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(names)}"


def _validate(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(_explain(e, tree) for e in error.errors())) from None


def _explain(error: Any, tree: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(_without_tags(path, tree))
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}; {nearest(path[-1], _siblings(path))}"
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "union_tag_invalid":
        choices = [choice.strip(" '") for choice in error["ctx"]["expected_tags"].split(",")]
        return f"unknown {key} {error['ctx']['tag']!r}; {nearest(error['ctx']['tag'], choices)}"
    if error["type"] == "union_tag_not_found":
        return f"{key}.name is missing"
    if error["type"] == "value_error":  # our own validators, whose messages name what they found
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {error['msg']}, found {error['input']!r}"


def _without_tags(path: list[str], tree: Any) -> list[str]:
    """pydantic names the variant of a tagged union inside the path; the recipe's author has not written it there."""
    kept: list[str] = []
    for part in path:
        if kept and isinstance(tree, dict) and part not in tree and tree.get("name") == part:
            continue
        kept.append(part)
        tree = tree.get(part) if isinstance(tree, dict) else None
    return kept


def _siblings(path: list[str]) -> list[str]:
    """Valid keys at the place where the last part of a pydantic error path stands."""
    model: Any = Recipe
    for part in path[:-1]:
        fields = model.model_fields
        if part in fields:
            candidates = _settings_in(fields[part].annotation)
            model = candidates[0] if candidates else model
            variants = candidates
        else:
            model = next((v for v in variants if _tag(v) == part), model)
    return list(model.model_fields)


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _settings_in(argument)]


def _tag(model: type[Settings]) -> str | None:
    field = model.model_fields.get("name")
    choices = get_args(field.annotation) if field else ()
    return choices[0] if choices else None
