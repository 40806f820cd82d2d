"""What a stage says of itself: before it begins, and in the table of all stages at the end."""

from __future__ import annotations

import json
from typing import Any

import torch

from sltscale import parallel
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.text import TextTokenizer
from sltscale.engine.run_folder import RunFolder
from sltscale.engine.telemetry import Telemetry
from sltscale.evaluation.report import table
from sltscale.files import write_atomically
from sltscale.preflight import Stage

Scores = dict[str, Any]
HEADLINES = (
    *("bleu1", "bleu4", "bleu4_shuffled", "chrf", "rouge_l", "bleurt"),
    *("t2v_recall@1", "v2t_recall@1", "t2v_recall@5"),
)


def count_truncated(telemetry: Telemetry, tokenizer: TextTokenizer, train: Selection) -> None:
    """A warning where training sentences are longer than the model takes."""
    if parallel.rank() == 0:
        truncated = tokenizer.count_truncated(train.texts())
        if truncated:
            telemetry.say(
                f"warning: {truncated} of {len(train)} training sentences are longer than text.max_tokens "
                f"{tokenizer.max_tokens} and lose their end"
            )


def introduce(
    stage: Stage,
    telemetry: Telemetry,
    method: torch.nn.Module,
    plan: Plan,
    first_step: int,
    deepspeed_json: dict[str, Any],
) -> None:
    """Size, steps, ranks, what the batches waste, where the weights come from."""
    recipe, ranks = stage.recipe, parallel.world_size()
    stage_number = deepspeed_json.get("zero_optimization", {}).get("stage", 0)
    waste = plan.padding_and_imbalance(0, ranks)
    shapes = [getattr(p, "ds_numel", p.numel()) for p in method.parameters()]
    telemetry.say(
        f"{recipe.name}: {recipe.method.name}, {sum(shapes) / 1e6:.2f} M parameters, "
        f"{len(plan.lengths)} clips, {recipe.train.epochs} epochs, {plan.steps(recipe.train.epochs)} steps of about "
        f"{plan.clips_per_epoch / plan.steps(1):.0f} clips; {ranks} ranks, ZeRO {stage_number}"
    )
    telemetry.say(
        f"{recipe.name}: padding {100 * waste.padding:.1f} % if padded, "
        f"frames of the busiest rank {100 * waste.imbalance:.1f} % above the mean"
    )
    if stage.starts_from is not None and recipe.start is not None:
        telemetry.say(f"{recipe.name}: {', '.join(recipe.start.parts)} from {stage.starts_from}")
    if first_step:
        telemetry.say(f"{recipe.name}: going on from the checkpoint of step {first_step}")


def brief(scores: Scores) -> str:
    """The headlines among them, in one line."""
    return ", ".join(f"{name} {scores[name]:.2f}" for name in HEADLINES if name in scores) or "no scores"


def read_scores(folder: RunFolder) -> Scores:
    """Of a finished run, on the test split."""
    return json.loads((folder.path / "evaluation" / "test" / "metrics.json").read_text())


def summarise(stages: list[Stage], scores: list[dict[str, Any]]) -> None:
    """summary.json of the last run - the scores of all stages side by side - and the table on the terminal."""
    folder = stages[-1].folder.path
    seconds = {stage.recipe.name: stage.folder.status()["seconds"] for stage in stages}
    summary: dict[str, Any] = {}
    for values in scores:
        summary |= {name: value for name, value in values.items() if isinstance(value, int | float)}
    summary |= {"seconds": sum(seconds.values()), "stages": seconds}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    columns = [name for name in HEADLINES if name != "bleurt" or any(name in values for values in scores)]
    rows = [["stage (test split)", *columns, "minutes"]]
    for stage, values in zip(stages, scores, strict=True):
        cells = [f"{values[name]:.2f}" if name in values else "-" for name in columns]
        rows.append([stage.recipe.name, *cells, f"{seconds[stage.recipe.name] / 60:.1f}"])
    print(table(rows))
    print(f"run folder: {folder}", flush=True)
