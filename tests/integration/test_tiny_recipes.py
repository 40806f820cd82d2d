"""Every recipe for two CPU cores, from shards to metrics through the real launcher, on a corpus of sixty clips."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launching import ROOT, Launcher

from sltscale.recipe_files import load_recipe, recipe_names

TRAIN = ROOT / "sltscale/train.py"
TINY = [name for name in recipe_names() if name.endswith("_tiny")]
# Overrides that make of a recipe what the same name with a suffix stands for.
VARIANTS = {
    "gfslt_slt_tiny-v2": (
        *("--start.recipe", "gfslt_vlp_v2_tiny", "--start.parts"),
        '["visual.frames", "visual.temporal", "visual.transformer.blocks -> language_model.model.encoder", '
        '"text_decoder.blocks -> language_model.model.decoder"]',
    ),
    "gfslt_vlp_v1_tiny-strong": ("--data.augment", "strong_color", "--data.temporal_rescale", "0.2"),
    "c2rl_pretrain_tiny-shared": (
        *("--method.share_embeddings", "true", "--method.tied", "true"),
        *("--method.group_size", "4", "--method.special_tokens", "false"),
    ),
}
ZERO3 = (
    *("gfslt_vlp_v2_tiny", "gfslt_slt_tiny", "hfa_pretrain_tiny", "hfa_slt_tiny"),
    *("c2rl_pretrain_tiny-shared", "c2rl_slt_tiny", "llm_slt_tiny"),
)
TRANSLATION = ("bleu1", "bleu4", "bleu4_shuffled", "chrf", "rouge_l")
RETRIEVAL = ("t2v_recall@1", "v2t_recall@1", "t2v_median_rank", "v2t_mean_rank")
SHORT = ["--data.synthetic.clips", "60", "--train.epochs", "1", "--evaluation.max_new_tokens", "8"]
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(3600)]


@dataclass
class Runs:
    """Runs in a folder of their own, where also the shards are drawn. A recipe is trained once under each engine, what
    it starts from before it."""

    folder: Path
    launcher: Launcher
    finished: set[str] = field(default_factory=set)

    def train(self, name: str, zero: int = 2) -> Path:
        recipe, _, variant = name.partition("-")
        changes = list(VARIANTS[name]) if variant else []
        start = load_recipe(recipe, changes).start
        if start is not None:
            assert start.recipe is not None
            changes += ["--start.recipe", "none", "--start.run", str(self.train(start.recipe))]
        run = self.folder / "runs" / (name if zero == 2 else f"{name}-zero{zero}")
        if run.name not in self.finished:
            engine = ROOT / f"ds_configs/zero{zero}.json"
            arguments = ["--deepspeed", str(engine), "--recipe", recipe, "--run", str(run), *SHORT, *changes]
            self.launcher.check(TRAIN, arguments, ranks=2, cwd=self.folder, seconds=600)
            self.finished.add(run.name)
        return run


@pytest.fixture(scope="module")
def runs(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    launcher = Launcher(environment)
    yield Runs(tmp_path_factory.mktemp("tiny"), launcher)
    launcher.end()


def check_scores(run: Path, name: str) -> None:
    method = load_recipe(name.partition("-")[0]).method.name
    if method == "features":
        return  # nothing is scored before it is read
    metrics = json.loads((run / "evaluation/test/metrics.json").read_text())
    retrieves = method in ("c2rl", "retrieval", "gfslt_vlp", "hfa_pretraining")
    for score in RETRIEVAL if retrieves else TRANSLATION:
        assert math.isfinite(metrics[score]), score
    losses = [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert losses and all(map(math.isfinite, losses))
    assert json.loads((run / "STATUS.json").read_text())["state"] == "finished"


def test_there_is_a_tiny_recipe_of_each_system() -> None:
    assert {name.split("_")[0] for name in TINY} >= {"gfslt", "hfa", "c2rl", "llm"}
    assert {name.partition("-")[0] for name in (*VARIANTS, *ZERO3)} <= set(TINY)


@pytest.mark.parametrize("name", [*TINY, *VARIANTS])
def test_from_shards_to_metrics(name: str, runs: Runs) -> None:
    check_scores(runs.train(name), name)


@pytest.mark.parametrize("name", ZERO3)
def test_under_zero_3(name: str, runs: Runs) -> None:
    run = runs.train(name, zero=3)
    assert json.loads((run / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    check_scores(run, name)
