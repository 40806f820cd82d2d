"""Recipes: loading, bases, overrides, and one clear line with the nearest valid names for whatever is wrong."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sltscale.config import C2RLSettings, CausalSettings, LanguageModelSettings, Recipe, TranslationSettings
from sltscale.errors import InputError
from sltscale.recipe_files import differences, load_recipe, recipe_from_json, recipe_names

MINIMAL = """
name = "mine"
[data]
shards = "shards/x"
frame_size = 64
crop_size = 56
global_batch = 8
[method]
name = "c2rl"
[optim]
name = "sgd"
lr = 0.01
[train]
epochs = 3
"""

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str = MINIMAL, name: str = "mine.toml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def refusal(recipe: str, *overrides: str) -> str:
    with pytest.raises(InputError) as refused:
        load_recipe(recipe, overrides)
    message = str(refused.value)
    assert "\n" not in message and message
    return message


def test_minimal_recipe_and_its_defaults(write: Write) -> None:
    recipe = load_recipe(write())
    assert (recipe.name, recipe.seed, recipe.optim.lr, recipe.data.crop_size) == ("mine", 0, 0.01, 56)
    assert isinstance(recipe.method, C2RLSettings)
    assert recipe.method.visual.transformer.width == 512
    assert recipe.start is None and recipe.optim.clip_norm is None


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    if recipe.start is not None and recipe.start.recipe is not None:
        assert recipe.start.recipe in recipe_names()


def test_there_are_shipped_recipes_and_bases_are_none() -> None:
    assert "demo" in recipe_names()
    assert not any(name.startswith("_") for name in recipe_names())


def test_settings_are_frozen(write: Write) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(write()).optim.lr = 1.0  # type: ignore[misc]


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_are_toml_values(write: Write) -> None:
    recipe = load_recipe(
        write(),
        [
            *("--optim.lr", "1e-4"),
            "--train.epochs=12",
            *("--optim.betas", "[0.8, 0.99]"),
            *("--method.mask_inner", "false"),
            *("--data.shards", "shards/with space=and # more"),
            *("--method.visual.transformer.activation", "gelu"),
            *("--optim.min_lr", "0"),
        ],
    )
    assert recipe.optim.lr == 1e-4 and recipe.train.epochs == 12
    assert recipe.optim.betas == (0.8, 0.99)
    assert isinstance(recipe.method, C2RLSettings)
    assert recipe.method.mask_inner is False
    assert recipe.method.visual.transformer.activation == "gelu"
    assert recipe.data.shards == "shards/with space=and # more"


def test_the_last_override_wins_and_negative_values_are_values(write: Write) -> None:
    recipe = load_recipe(write(), ["--optim.lr=1", "--optim.lr", "2", "--evaluation.length_penalty", "-0.5"])
    assert recipe.optim.lr == 2 and recipe.evaluation.length_penalty == -0.5


def test_none_takes_a_value_away(write: Write) -> None:
    with_clip = write(MINIMAL.replace("lr = 0.01", "lr = 0.01\nclip_norm = 1.0"))
    assert load_recipe(with_clip).optim.clip_norm == 1.0
    assert load_recipe(with_clip, ["--optim.clip_norm", "none"]).optim.clip_norm is None
    assert load_recipe(with_clip, ["--optim.clip_norm=None"]).optim.clip_norm is None


def test_overrides_make_tables_that_the_recipe_lacks(write: Write) -> None:
    recipe = load_recipe(write(), ["--data.synthetic.clips", "40", "--data.synthetic.language", "en"])
    assert recipe.data.synthetic is not None
    assert (recipe.data.synthetic.clips, recipe.data.synthetic.language) == (40, "en")


def test_lists_of_tables(write: Write) -> None:
    groups = "[{part = 'language_model', lr = 1e-5}, {part = 'projection', lr = 1}]"
    recipe = load_recipe(write(), ["--optim.groups", groups])
    assert [(group.part, group.lr) for group in recipe.optim.groups] == [("language_model", 1e-5), ("projection", 1)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optim.lr"], "--optim.lr: no value given; expected --optim.lr VALUE"),
        (["optim.lr", "3"], "unexpected argument 'optim.lr'; expected --key value"),
        (["--seed", "1", "2"], "unexpected argument '2'"),
    ],
)
def test_malformed_overrides(write: Write, overrides: list[str], message: str) -> None:
    assert message in refusal(write(), *overrides)


# --- unknown names and wrong values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optim.weight_decai", "unknown key optim.weight_decai; did you mean weight_decay?"),
        ("optim.warmup-steps", "unknown key optim.warmup-steps; did you mean warmup_steps?"),
        ("trian.epochs", "unknown key trian; did you mean train?"),
        ("method.visual.transformer.widht", "unknown key method.visual.transformer.widht; did you mean width?"),
        ("method.inner_temprature", "unknown key method.inner_temprature; did you mean inner_temperature"),
        ("method.language_model", "unknown key method.language_model; "),
        ("qqqq", "unknown key qqqq; valid: name, seed, start, data, text, method, optim, train, evaluation"),
        ("optim.", "unknown key optim.; valid: name, lr"),
        ("data.synthetic.clip", "unknown key data.synthetic.clip; did you mean clips?"),
    ],
)
def test_unknown_keys_name_the_nearest(write: Write, key: str, message: str) -> None:
    assert message in refusal(write(), f"--{key}", "3")


def test_unknown_key_in_a_file_and_in_a_list(write: Write) -> None:
    assert "unknown key data.frame_sise; did you mean frame_size" in refusal(
        write(MINIMAL.replace("crop_size", "frame_sise = 3\ncrop_size"))
    )
    assert "unknown key optim.groups.0.prat; did you mean part?" in refusal(
        write(), "--optim.groups", '[{prat = "a", lr = 1}]'
    )


def test_all_errors_at_once(write: Write) -> None:
    message = refusal(write(), "--optim.lrr", "3", "--train.epochs", "0", "--data.frames", "2")
    assert "optim.lrr" in message and "train.epochs" in message and "data.frames" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "optim.lr",
            "fast",
            "optim.lr: Input should be a valid number, unable to parse string as a number, found 'fast'",
        ),
        ("optim.lr", "-1", "optim.lr: Input should be greater than 0, found -1"),
        ("optim.lr", "inf", "optim.lr: Input should be a finite number, found inf"),
        ("evaluation.length_penalty", "nan", "evaluation.length_penalty: Input should be a finite number, found nan"),
        ("optim.lr", "none", "optim.lr: Input should be a valid number, found None"),
        ("optim.name", "lion", "optim.name: Input should be 'sgd', 'adam' or 'adamw', found 'lion'"),
        ("seed", "1.5", "seed: Input should be a valid integer"),
        ("optim.betas", "[0.9]", "optim.betas.1 is missing"),
        ("optim", "3", "optim: Input should be a valid dictionary"),
        ("optim.lr.x", "3", "optim.lr: Input should be a valid number, found {'x': 3}"),
        ("method.name", "c2rll", "unknown method 'c2rll'; did you mean c2rl?"),
        ("method.name", "zzz", "unknown method 'zzz'; valid: c2rl, translation"),
        ("data.crop_size", "65", "data: crop_size 65 is larger than frame_size 64"),
        ("data.sampling_rate", "0", "data.sampling_rate: Input should be greater than 0, found 0"),
    ],
)
def test_wrong_values_say_what_was_found_and_expected(write: Write, key: str, value: str, message: str) -> None:
    found = refusal(write(), f"--{key}", value)
    assert message in found and len(found) < 300


def test_start_needs_exactly_one_source(write: Write) -> None:
    assert "start: start needs either a recipe or a run" in refusal(write(), "--start.recipe", "a", "--start.run", "b")
    assert "start: start needs either a recipe or a run" in refusal(write(), "--start.parts", '["visual"]')
    assert load_recipe(write(), ["--start.run", "runs/x"]).start is not None


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("lr = 0.01\n", "optim.lr is missing"),
        ("[train]\nepochs = 3\n", "train is missing"),
        ('[method]\nname = "c2rl"\n', "method is missing"),
        ('name = "c2rl"\n', "method.name is missing"),
    ],
)
def test_missing_values(write: Write, missing: str, message: str) -> None:
    assert message in refusal(write(MINIMAL.replace(missing, "")))


def test_a_recipe_may_be_named_like_its_missing_section(write: Write) -> None:
    assert "train is missing" in refusal(write(MINIMAL.replace("mine", "train").replace("[train]\nepochs = 3\n", "")))


# --- files and bases -------------------------------------------------------------------------------------------------


def test_unknown_recipe_names_the_nearest() -> None:
    assert refusal("dmo").startswith("unknown recipe 'dmo'; did you mean demo")
    every = ", ".join(recipe_names())
    assert refusal("xyzzyxyzzy") == f"unknown recipe 'xyzzyxyzzy'; valid: {every}"
    assert "unknown recipe '../recipes/demo'" in refusal("../recipes/demo")


def test_files_that_are_no_recipes(write: Write, tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "none.toml")) == f"recipe file {tmp_path / 'none.toml'} does not exist"
    assert "not valid TOML" in refusal(write("name = ["))
    assert "not valid TOML" in refusal(write(MINIMAL.replace("lr = 0.01", "lr = 0.01\nlr = 0.02")))
    (tmp_path / "latin.toml").write_bytes('name = "grüße"'.encode("latin-1"))
    assert "not valid TOML" in refusal(str(tmp_path / "latin.toml"))


def test_base_is_merged_table_by_table_and_lies_beside_the_recipe(write: Write) -> None:
    write(MINIMAL.replace("lr = 0.01", "lr = 0.01\nbetas = [0.5, 0.6]"), "base.toml")
    recipe = load_recipe(write('base = "base.toml"\nname = "child"\n[optim]\nlr = 0.5\n', "child.toml"))
    assert (recipe.name, recipe.optim.lr, recipe.optim.name, recipe.train.epochs) == ("child", 0.5, "sgd", 3)
    assert recipe.optim.betas == (0.5, 0.6)
    assert load_recipe(write('base = "base.toml"\noptim.betas = [0.1, 0.2]')).optim.betas == (0.1, 0.2)


def test_a_shipped_recipe_as_base(write: Write) -> None:
    recipe = load_recipe(write('base = "c2rl_pretrain"\nname = "mine"\n[train]\nepochs = 1\n'))
    assert recipe.train.epochs == 1
    assert recipe.method == load_recipe("c2rl_pretrain").method


def test_bases_of_bases_and_bad_bases_are_refused(write: Write) -> None:
    write(MINIMAL, "a.toml")
    write('base = "a.toml"\n', "b.toml")
    assert "has a base itself; a recipe may have one base only" in refusal(write('base = "b.toml"\n', "c.toml"))
    assert "has a base itself" in refusal(write('base = "self.toml"\n' + MINIMAL, "self.toml"))
    assert "base: expected a recipe name or TOML file, found 3" in refusal(write("base = 3\n" + MINIMAL))
    assert "unknown recipe 'dmo'; did you mean demo" in refusal(write('base = "dmo"\n' + MINIMAL))
    assert "gone.toml does not exist" in refusal(write('base = "gone.toml"\n' + MINIMAL))


# --- language models of other architectures -------------------------------------------------------------------------

MBART = MINIMAL.replace(
    'name = "c2rl"', 'name = "translation"\n[method.language_model]\nwidth = 64\nencoder_layers = 2'
)
CAUSAL = '[method.language_model]\narchitecture = "causal"\nlayers = 2\n'


def test_another_architecture_takes_nothing_of_the_bases(write: Write) -> None:
    write(MBART, "base.toml")
    same = load_recipe(write('base = "base.toml"\nname = "b"\n[method.language_model]\nheads = 4\n', "same.toml"))
    assert isinstance(same.method, TranslationSettings)
    assert isinstance(same.method.language_model, LanguageModelSettings)
    assert (same.method.language_model.width, same.method.language_model.heads) == (64, 4)
    other = load_recipe(write(f'base = "base.toml"\nname = "c"\n{CAUSAL}', "other.toml"))
    assert isinstance(other.method, TranslationSettings)
    assert isinstance(other.method.language_model, CausalSettings)
    assert (other.method.language_model.width, other.method.language_model.layers) == (896, 2)
    assert other.prompts is not None and sorted(other.prompts) == ["de", "en", "zh"]
    assert (same.prompts, load_recipe(write()).prompts) == (None, None)
    assert recipe_from_json(other.to_json(), "here") == other


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.language_model.architecture", "mt6", "unknown method.language_model 'mt6'; did you mean mt5"),
        ("method.language_model.widht", "3", "unknown key method.language_model.widht; did you mean width?"),
        (
            "method.language_model",
            '{architecture = "causal", encoder_layers = 3}',
            "unknown key method.language_model.encoder_layers; did you mean layers",
        ),
        ("method.language_model", '{architecture = "causal", prompts = {}}', "prompts is empty; give one for each"),
        ("method.language_model", '{architecture = "causal", prompts = {DE = "a"}}', "String should match pattern"),
        (
            "method.language_model",
            '{architecture = "causal", max_positions = 300}',
            "data.max_frames + evaluation.max_new_tokens + 1 is 401, more than method.language_model.max_positions 300",
        ),
    ],
)
def test_wrong_language_models(write: Write, key: str, value: str, message: str) -> None:
    found = refusal(write(MBART), f"--{key}", value)
    assert message in found and len(found) < 300


def test_another_name_for_a_recipe_that_has_a_base(write: Write) -> None:
    write(MINIMAL, "a.toml")
    write('base = "a.toml"\nname = "b"\n[optim]\nlr = 0.5\n', "b.toml")
    alias = 'base = "b.toml"\nname = "c"\n'
    recipe = load_recipe(write(alias, "c.toml"))
    assert (recipe.name, recipe.optim.lr, recipe.train.epochs) == ("c", 0.5, 3)
    assert "may have one base only" in refusal(write(alias + "seed = 3\n", "c.toml"))
    assert "may have one base only" in refusal(write('base = "c.toml"\nname = "d"\n', "d.toml"))
    demo = load_recipe("demo_pretrain")
    assert load_recipe("c2rl_pretrain_tiny") == demo.model_copy(update={"name": "c2rl_pretrain_tiny"})


# --- stored configurations -------------------------------------------------------------------------------------------


def test_stored_recipe_comes_back_equal(write: Write) -> None:
    recipe = load_recipe(write(), ["--optim.lr", "0.1", "--start.run", "runs/ä", "--optim.betas", "[0.1, 0.3]"])
    assert recipe_from_json(recipe.to_json(), "here") == recipe


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "3"])
def test_foreign_stored_configuration(text: str) -> None:
    with pytest.raises(InputError, match=r"^runs/x/config.json: not a stored configuration \("):
        recipe_from_json(text, "runs/x/config.json")


def test_stored_configuration_of_another_version(write: Write) -> None:
    text = load_recipe(write()).to_json().replace('"warmup_steps"', '"warmup"')
    with pytest.raises(InputError, match=r"^run: unknown key optim.warmup; did you mean warmup_steps"):
        recipe_from_json(text, "run")


def test_differences(write: Write) -> None:
    ours, theirs = load_recipe(write()), load_recipe(write(), ["--optim.lr", "0.1", "--optim.clip_norm", "1"])
    assert differences(ours, ours) == []
    assert differences(ours, theirs) == [
        "optim.clip_norm None (run) / 1.0 (asked)",
        "optim.lr 0.01 (run) / 0.1 (asked)",
    ]


def test_differences_of_other_variants(write: Write) -> None:
    translation: Recipe = load_recipe(write(), ["--method.name", "translation"])
    assert isinstance(translation.method, TranslationSettings)
    found = differences(load_recipe(write()), translation)
    assert "method.name c2rl (run) / translation (asked)" in found
    assert "method.alpha 1.0 (run) / - (asked)" in found
    assert "method.language_model.width - (run) / 1024 (asked)" in found


def test_config_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, sltscale.recipe_files as c; c.load_recipe(c.recipe_names()[0]); print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=600)
    heavy = {"torch", "deepspeed", "transformers", "numpy", "av", "webdataset", "sacrebleu"}
    assert not heavy & set(loaded.stdout.split())
