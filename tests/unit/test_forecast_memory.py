"""``sltscale forecast``: what it says of a recipe, whether it fits and what would, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from openasl_corpus import pack, write_corpus

from sltscale.cli import main
from sltscale.data.shards.index import open_index
from sltscale.forecast.fitting import RESERVED, Fitting, towers
from sltscale.forecast.states import EngineSetting, Group, Parameters, held, most_held
from sltscale.forecast.workload import assume_corpus, busiest_share, read_corpus, run_length
from sltscale.methods.base import Vocabulary
from sltscale.recipe_files import load_recipe

SMALL = ["--data.crop_size", "32", "--data.global_batch", "8", "--data.max_frames", "24"]


def test_padding_and_edges_of_partitions() -> None:
    """Worked out by hand: 10 + 5 = 15 elements on 3 ranks, padded to 18, 6 to each."""
    parameters = Parameters((Group("adamw", (10, 5)),), (5,), 8)
    first, second, third = (held(parameters, EngineSetting(stage=2), 3, rank)[0] for rank in range(3))
    assert (first.parameters, first.masters, first.optimizer, first.buffers) == (4 * (18 + 5), 4 * 6, 2 * 4 * 6 + 4, 8)
    assert [one.gradients for one in (first, second, third)] == [4 * 10, 4 * 15, 4 * (5 + 3)]
    assert most_held(parameters, EngineSetting(stage=2), 3)[0] == second
    whole = held(parameters, EngineSetting(), 3, 0)[0]
    assert (whole.parameters, whole.masters, whole.gradients, whole.optimizer) == (
        4 * 20,
        0,
        4 * 15,
        2 * 4 * 15 + 2 * 4,
    )
    # Parts of 4 and 2 and, of the frozen one, 2; those of 5 elements are kept whole too, padded to 6.
    halves = held(parameters, EngineSetting(stage=3, bf16=True, persistent=5), 3, 0)[0]
    assert (halves.parameters, halves.masters, halves.gradients) == (2 * (4 + 2 + 2) + 2 * (6 + 6), 4 * 6, 2 * 6)


def test_a_deepspeed_configuration_is_understood() -> None:
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "reduce_bucket_size": 1e6}
    setting = EngineSetting.of({"zero_optimization": zero, "bf16": {"enabled": True}})
    assert (setting.stage, setting.bf16, setting.offload_parameters, setting.offload_optimizer) == (
        3,
        True,
        True,
        False,
    )
    assert (setting.bucket, setting.buckets, setting.element) == (1_000_000, 1, 2)
    assert EngineSetting.of({"zero_optimization": {"stage": 2, "overlap_comm": True}}).buckets == 2
    assert not setting.at(0).bf16


def test_nearest_setting_that_fits_changes_no_more_than_it_must() -> None:
    layers = ["--method.visual.transformer.layers", "1", "--method.text_decoder.layers", "1"]
    recipe = load_recipe("demo_pretrain", [*SMALL, *layers, "--method.text_encoder.layers", "1"])
    corpus, setting = assume_corpus(recipe, None, None, None), EngineSetting(stage=0, bucket=100_000)
    fitting = Fitting(recipe, Vocabulary(500, 1, 2), corpus, 2, 10**12, setting)
    assert fitting.case(setting, "none").fits
    peaks = {(case.engine.title, case.policy): case.peak for case in fitting.cases()}
    lower = [title for title in ("ZeRO 0", "ZeRO 1", "ZeRO 2") if peaks[title, "none"] <= peaks["ZeRO 2", "none"]]
    fitting.memory = RESERVED + peaks["ZeRO 2", "none"]
    plain = fitting.nearest()
    assert plain is not None
    assert (plain.engine.title, plain.changes) == (lower[0], ())
    fitting.memory = RESERVED + min(peaks.values()) - 1
    smaller = fitting.nearest()
    assert smaller is not None and smaller.fits
    assert "--data.micro_frames 48" in smaller.changes
    fitting.memory = RESERVED + 1
    assert fitting.nearest() is None


def test_towers_are_found_by_their_settings() -> None:
    assert set(towers(load_recipe("c2rl_pretrain"))) == {
        "visual.frames",
        "visual.transformer",
        "text_encoder",
        "text_decoder",
    }


def test_with_shards_it_counts_them(tmp_path: Path) -> None:
    pack(write_corpus(tmp_path), tmp_path / "shards")
    index = open_index(tmp_path / "shards", "train")
    overrides = ["--data.shards", str(tmp_path / "shards"), "--data.global_batch", "4", "--data.sampling_rate", "0.5"]
    recipe = load_recipe("c2rl_pretrain", [*overrides, "--text.vocabulary", "200", "--train.epochs", "3"])
    corpus = read_corpus(recipe)
    length = run_length(corpus, recipe, nodes=2)
    assert length is not None
    assert length.steps == 3 * -(-len(index) // 4)
    assert length.frames == 3 * sum(int(frames) // 2 for frames in index.frames)
    assert length.bytes == round(int(index.size.sum()) / 2)
    assert length.tokens == 3 * int(corpus.tokens.sum())
    share, parts = busiest_share(corpus, recipe, 2)
    assert parts == (len(share.frames),) and len(share.tokens) == len(share.frames)
    assert sum(share.frames) >= max(corpus.frames)


def forecast(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """(exit code, output, errors)"""
    capsys.readouterr()
    code = main(["forecast", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_without_shards_it_says_what_it_assumes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["c2rl_pretrain", "--data.shards", tmp_path / "none", "--gpus", "2", *SMALL]
    length = ["--clips", "80", "--frames", "20", "--frames-per-second", "100"]
    code, output, _ = forecast(capsys, *arguments, *length, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(output)
    assert found["share"] == {"frames": [20] * 4, "tokens": [32] * 4}
    assert found["run"]["steps"] == 200 * 10
    assert found["run"]["hours"] == pytest.approx(200 * 80 * 20 / (2 * 100) / 3600)
    assert "assumed" in found["basis"] and "as given" in found["speed"]
    assert found["chosen"]["fits"] and found["nearest"] is None


@pytest.mark.slow
def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["c2rl_pretrain", "--data.shards", tmp_path / "none", "--gpus", "2", *SMALL]
    code, output, _ = forecast(capsys, *arguments, "--gpu-memory", "0.1")
    assert code == 0
    assert "does not fit" in output and "give --clips" in output


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, expected in (
        (["c2rl_pretrain", "--gpus", "100"], "100 ranks"),
        (["c2rl_pretrain", "--shards", tmp_path], "no train split"),
        (["c2rl_pretrain", "--deepspeed", tmp_path / "x.json"], "does not exist"),
        (["c2rl_pretrain", "--optim.rl", "1"], "optim.rl"),
        (["hfa_pretrain"], "pseudo-glosses"),
    ):
        code, output, errors = forecast(capsys, *arguments)
        assert code == 2, output
        assert len(errors.splitlines()) == 1 and expected in errors
