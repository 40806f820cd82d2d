"""The systems against each other on the synthetic corpus: python tools/results_table.py runs/results [--only NAME ...].

Every training sees the same clips, as many frames of them, and takes as many epochs: PRETRAINING where there is any,
TRANSLATION. A system is a row of the table, in SYSTEMS; what it needs is trained for each seed, as the cells of a sweep
(docs/sweeps.md; ``sltscale sweep status FOLDER``). Finished cells are kept, killed ones go on, so that the same command
again completes what is missing. The table, mean and standard deviation over the seeds that are finished, with date and
commands, takes the place of the section TITLE in ``--into``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sltscale.errors import InputError
from sltscale.files import write_atomically
from sltscale.sweeps.folder import Sweep, plan, write
from sltscale.sweeps.grid import Cell
from sltscale.sweeps.running import STOPPED, run_cell

TITLE = "## The systems against each other"
CLIPS, PRETRAINING, TRANSLATION = 1600, 6, 5  # clips, epochs
# Of all trainings: fewer and smaller pictures than the tiny recipes have, so that the whole takes an hour.
COMMON = (
    *("--data.shards", "shards/results", "--data.synthetic.clips", str(CLIPS)),
    *("--data.frame_size", "56", "--data.crop_size", "48", "--data.sampling_rate", "0.25", "--data.max_frames", "100"),
    *("--evaluation.every_epochs", "none"),
)
RANKS = 2
LAUNCH = ("deepspeed", "--num_gpus", str(RANKS), "sltscale/train.py", "--deepspeed", "ds_configs/zero2.json")
HFA = ("--method.visual.frames.image_size", "48")
V2_PARTS = (
    '["visual.frames", "visual.temporal", "visual.transformer.blocks -> language_model.model.encoder", '
    '"text_decoder.blocks -> language_model.model.decoder"]'
)


@dataclass(frozen=True)
class Training:
    """start: the training that gives the first weights. In overrides, {folder} and {seed} are filled in."""

    recipe: str
    epochs: int
    overrides: tuple[str, ...] = ()
    start: str | None = None


TRAININGS = {
    "gfslt-v1": Training("gfslt_vlp_v1_tiny", PRETRAINING),
    "gfslt-v2": Training("gfslt_vlp_v2_tiny", PRETRAINING),
    "hfa": Training("hfa_pretrain_tiny", PRETRAINING, HFA),
    "hfa-align": Training("hfa_pretrain_tiny", PRETRAINING, (*HFA, "--method.pseudo_gloss", "0")),
    "c2rl": Training("c2rl_pretrain_tiny", PRETRAINING),
    "c2rl-icl": Training("c2rl_pretrain_tiny", PRETRAINING, ("--method.beta", "0")),
    "c2rl-ecl": Training("c2rl_pretrain_tiny", PRETRAINING, ("--method.alpha", "0")),
    "gfslt-slt": Training("gfslt_baseline_tiny", TRANSLATION),
    "gfslt-v1-slt": Training("gfslt_slt_tiny", TRANSLATION, (), "gfslt-v1"),
    "gfslt-v2-slt": Training("gfslt_slt_tiny", TRANSLATION, ("--start.parts", V2_PARTS), "gfslt-v2"),
}
# HFA's two phases share the epochs; C2RL translates from stored tokens, in the form it is published in.
for _name in ("hfa", "hfa-align"):
    TRAININGS[f"{_name}-mapper"] = Training("hfa_slt_mapper_tiny", TRANSLATION // 3, HFA, _name)
    TRAININGS[f"{_name}-slt"] = Training("hfa_slt_tiny", TRANSLATION - TRANSLATION // 3, HFA, f"{_name}-mapper")
for _name in ("c2rl", "c2rl-icl", "c2rl-ecl"):
    _folder = f"{{folder}}/{_name}-tokens-seed{{seed}}/features"
    TRAININGS[f"{_name}-tokens"] = Training("c2rl_features_tiny", 1, ("--method.folder", _folder), _name)
    TRAININGS[f"{_name}-slt"] = Training("c2rl_slt_tiny", TRANSLATION, ("--data.features", _folder), f"{_name}-tokens")
TRAININGS["c2rl-slt-end-to-end"] = Training("demo", TRANSLATION, (), "c2rl")
TRAININGS["slt-end-to-end"] = Training("demo", TRANSLATION, ("--start", "none"))
TRAININGS["llm-slt"] = Training("llm_slt_tiny", TRANSLATION, (), "c2rl")


@dataclass(frozen=True)
class System:
    """A row. pretraining, translation: whose scores on the test split it shows."""

    name: str
    pretraining: str | None
    translation: str


SYSTEMS = {
    "gfslt": System("GFSLT, no pretraining", None, "gfslt-slt"),
    "gfslt-vlp-v1": System("GFSLT-VLP v1", "gfslt-v1", "gfslt-v1-slt"),
    "gfslt-vlp-v2": System("GFSLT-VLP v2", "gfslt-v2", "gfslt-v2-slt"),
    "hfa": System("HFA", "hfa", "hfa-slt"),
    "hfa-align": System("HFA without pseudo-glosses", "hfa-align", "hfa-align-slt"),
    "c2rl": System("C2RL (ICL and ECL), on its frozen tokens", "c2rl", "c2rl-slt"),
    "c2rl-icl": System("C2RL, ICL only", "c2rl-icl", "c2rl-icl-slt"),
    "c2rl-ecl": System("C2RL, ECL only", "c2rl-ecl", "c2rl-ecl-slt"),
    "c2rl-end-to-end": System("C2RL, encoder learning on", "c2rl", "c2rl-slt-end-to-end"),
    "c2rl-none": System("the same without pretraining", None, "slt-end-to-end"),
    "llm": System("decoder-only language model after C2RL", "c2rl", "llm-slt"),
}
RETRIEVED, TRANSLATED = ("t2v_recall@1", "v2t_recall@1"), ("bleu4", "rouge_l", "chrf", "bleu4_shuffled")
HEADER = ("system", "T2V R@1", "V2T R@1", "BLEU-4", "ROUGE-L", "chrF", "BLEU-4 shuffled", "seeds", "minutes a seed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--into", type=Path, help="Markdown file, e.g. docs/results.md (default: print only)")
    parser.add_argument("--no-training", action="store_true", help="the table of what is there")
    options = parser.parse_args()
    try:
        sweep = plan(options.folder, Path(LAUNCH[-1]), [*_cells(options.folder, options.seeds)])
        write(sweep)
        code = 0 if options.no_training else _train(sweep, options.only, options.seeds)
        section = _section(sweep, options.folder, options.only, options.seeds)
        print(section)
        if options.into is not None:
            _replace(options.into, section)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return code


def _cells(folder: Path, seeds: Sequence[int]) -> Iterator[Cell]:
    """Of all systems, whichever are asked for, so that a cell's number stays."""
    for seed in seeds:
        for name, training in TRAININGS.items():
            own = (part.format(folder=folder, seed=seed) for part in training.overrides)
            overrides = [*COMMON, "--seed", str(seed), "--train.epochs", str(training.epochs), *own]
            if training.start is not None:
                run = folder / f"{training.start}-seed{seed}" / TRAININGS[training.start].recipe
                overrides += ["--start.recipe", "none", "--start.run", str(run)]
            values = {"training": name, "seed": str(seed)}
            yield Cell(f"{name}-seed{seed}", values, training.recipe, tuple(overrides))


def _needed(systems: Sequence[str]) -> list[str]:
    """The trainings of these systems, each behind what it starts from."""
    names: set[str] = set()
    for system in systems:
        name: str | None = SYSTEMS[system].translation
        while name is not None:
            names.add(name)
            name = TRAININGS[name].start
    order: list[str] = []
    for name in TRAININGS:
        chain = [name]
        while (start := TRAININGS[chain[0]].start) is not None:
            chain.insert(0, start)
        order += [one for one in chain if name in names and one not in order]
    return order


def _train(sweep: Sweep, systems: Sequence[str], seeds: Sequence[int]) -> int:
    """Seed after seed; the last exit code that is not 0. A training whose start has failed fails by itself."""
    cells = {cell.name: cell for cell in sweep.cells}
    last = 0
    for seed in seeds:
        for name in _needed(systems):
            code = run_cell(sweep.run(cells[f"{name}-seed{seed}"]), sweep.deepspeed, RANKS)
            if code == STOPPED or code > 128:
                return code
            last = code or last
    return last


def _section(sweep: Sweep, folder: Path, systems: Sequence[str], seeds: Sequence[int]) -> str:
    cells = {cell.name: cell for cell in sweep.cells}
    rows: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER)]
    for system in systems:
        row = SYSTEMS[system]
        scores = {
            name: [_scores(sweep, cells[f"{name}-seed{seed}"]) for seed in seeds]
            for name in (row.pretraining, row.translation)
            if name is not None
        }
        done = [found for found in scores[row.translation] if found]
        minutes = [
            sum(_minutes(sweep, cells[f"{name}-seed{seed}"]) for name in _needed([system]))
            for seed, found in zip(seeds, scores[row.translation], strict=True)
            if found
        ]
        retrieved = [_spread(scores.get(row.pretraining or "", []), score) for score in RETRIEVED]
        translated = [_spread(done, score) for score in TRANSLATED]
        spent = f"{statistics.mean(minutes):.1f}" if minutes else "-"
        rows.append([row.name, *retrieved, *translated, str(len(done)), spent])
    shared = [*LAUNCH, *COMMON, "--seed", str(seeds[0])]
    commands = [
        ["--recipe", cell.recipe, "--run", str(folder / name / cell.recipe), *_own(cell)]
        for name, cell in cells.items()
        if name in {f"{needed}-seed{seeds[0]}" for needed in _needed(systems)}
    ]
    lines = [
        TITLE,
        "",
        f"{CLIPS} clips of the synthetic corpus; {PRETRAINING} epochs of pretraining at 32 clips a batch,",
        f"{TRANSLATION} of translation at 16; a quarter of the frames, 48 x 48 pixels. Means over the seeds, deviation",
        "in brackets; minutes with all that a row starts from.",
        "",
        f"    python tools/results_table.py {folder} --into docs/results.md",
        "",
        f"{datetime.date.today().isoformat()}. One row alone with `--only` and its name:",
        f"{', '.join(SYSTEMS)}.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"The trainings behind it, for seed {seeds[0]}:",
        "",
        f'    train="{shlex.join(shared)}"',
        *(f"    $train {shlex.join(command)}" for command in commands),
    ]
    return "\n".join(lines) + "\n"


def _own(cell: Cell) -> tuple[str, ...]:
    """A cell's overrides behind those that all have, and the seed."""
    return cell.overrides[len(COMMON) + 2 :]


def _scores(sweep: Sweep, cell: Cell) -> dict[str, float]:
    run = sweep.run(cell)
    path = run.run_folder.path / "evaluation/test/metrics.json"
    return json.loads(path.read_text()) if run.finished and path.is_file() else {}


def _minutes(sweep: Sweep, cell: Cell) -> float:
    return float(sweep.run(cell).run_folder.status().get("seconds", 0.0)) / 60


def _spread(found: Sequence[dict[str, float]], score: str) -> str:
    values = [scores[score] for scores in found if score in scores]
    if not values:
        return "-"
    deviation = f" ({statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _replace(path: Path, section: str) -> None:
    """The section in place of the one of the same title, or at the end."""
    try:
        head, title, rest = path.read_text(encoding="utf-8").partition(f"{TITLE}\n")
        _, following, tail = rest.partition("\n## ")
        write_atomically(path, f"{head if title else head.rstrip() + chr(10) * 2}{section}{following}{tail}")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; name another file") from None


if __name__ == "__main__":
    raise SystemExit(main())
