"""A clip that makes NaN on one rank: the same step is skipped on all, nothing changes by it, and the log names it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_ranks import Starter, worker

from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.engine.manifest import read_manifest

pytestmark = pytest.mark.multiprocess
CLIP = "5"


@pytest.fixture(scope="module")
def starter(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(environment, tmp_path_factory.mktemp("logs"))
    yield starter
    starter.end()


def place(micro_frames: int | None) -> tuple[int, int]:
    """(step, rank) of the clip in the first epoch on two ranks."""
    recipe = worker().recipe_for("c2rl", "adamw", 0.0, 0.5)
    lengths = [len(worker().clip(number)[0]) for number in range(worker().CLIPS)]
    plan = Plan(lengths, recipe.seed, BatchRule.of(recipe.data), micro_frames=micro_frames)
    for step in range(plan.steps(1)):
        for rank in range(2):
            if int(CLIP) in plan.share(step, rank, 2).tolist():
                return step, rank
    raise AssertionError


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("stage", "how"),
    [
        *((stage, {}) for stage in (0, 1, 2, 3)),
        *((stage, {"micro_frames": 16}) for stage in (0, 1, 2, 3)),
        *((stage, {"bf16": True}) for stage in (1, 2, 3)),
    ],
    ids=lambda value: next(iter(value), "plain") if isinstance(value, dict) else f"zero{value}",
)
def test_the_step_is_skipped_and_the_clip_named(
    stage: int, how: dict[str, Any], what: str, starter: Starter, tmp_path: Path
) -> None:
    step, rank = place(how.get("micro_frames"))
    # With adamw there is optimizer state that a step of NaN would spoil, with clipping a norm that it would.
    output = starter.check(
        tmp_path,
        **how,
        stage=stage,
        steps=step + 2,
        train={"checkpoint_every": 1, "keep_checkpoints": 9},
        poison={"clips": [CLIP], "gradient": what == "gradient", "times": 1},
    )
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "not_finite" in record] == [step]
    line = records[step]["not_finite"]
    assert f"step {step}: the {what} is not finite; rank {rank}, clips {CLIP}, first in the " in line
    assert "skipped on all ranks" in line
    assert line in output
    checkpoints = {f.name: read_manifest(f).manifest for f in sorted((tmp_path / "checkpoints").glob("step-*"))}
    before, after, later = (checkpoints.get(f"step-{number:08d}") for number in (step, step + 1, step + 2))
    assert after is not None
    assert later is not None
    if before is not None:
        assert before["files"] == after["files"]  # weights, optimizer state, running statistics: bit by bit
        assert before["scalars"] == after["scalars"]
    assert later["files"] != after["files"]


def test_after_so_many_in_a_row_the_run_stops(starter: Starter, tmp_path: Path) -> None:
    everything = [str(number) for number in range(worker().CLIPS)]
    ranks = starter.start(
        tmp_path, train={"max_skipped": 2}, poison={"clips": everything, "gradient": False, "times": 99}
    )
    assert ranks.wait() == [1, 1], ranks.output()[-3000:]
    assert "error: 2 steps in a row were not finite (train.max_skipped): step 0: rank 0, clips " in ranks.output()
    assert "; step 1: rank 0, clips " in ranks.output()
