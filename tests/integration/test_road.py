"""The whole road through the real commands: shards, pretraining, translation, evaluation, files."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from launching import ROOT, Launcher
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Command = Callable[..., subprocess.CompletedProcess[str]]
TRAIN = ROOT / "sltscale/train.py"
ZERO2 = ROOT / "ds_configs/zero2.json"
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def run(corpus, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The translation run; tiny_pretrain lies beside it."""
    launcher = Launcher(environment)
    run = tmp_path_factory.mktemp("runs") / "tiny_translation"
    try:
        output = launcher.check(
            TRAIN,
            ["--deepspeed", str(ZERO2), "--recipe", str(corpus.translate), "--run", str(run)]
            + ["--evaluation.every_epochs", "2"],
            ranks=2,
        )
    finally:
        launcher.end()
    assert f"run folder: {run}" in output
    return run


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def test_summary_holds_both_stages(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in ("bleu4", "bleu4_shuffled", "t2v_recall@1", "v2t_recall@1"):
        assert 0 <= summary[name] <= 100
    assert summary["seconds"] > 0
    assert set(summary["stages"]) == {"tiny_pretrain", "tiny_translation"}


def test_run_folder_tells_what_ran(run: Path) -> None:
    for folder in (run, run.parent / "tiny_pretrain"):
        numbers = [record["step"] for record in steps(folder)]
        assert numbers == list(range(len(numbers)))
        config = json.loads((folder / "config.json").read_text())
        assert config["data"]["frame_size"] == 32
        assert json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
        attempt = json.loads((folder / "environment.json").read_text())[-1]
        assert attempt["world_size"] == 2
        assert attempt["packages"]["deepspeed"] != "absent"
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert list((folder / "tensorboard").glob("events*"))
        log = (folder / "log.txt").read_text()
        for word in ("clips/s", "frames/s", "data wait", "memory", "padding"):
            assert word in log
    assert (run / "evaluation/dev-epoch-0002/hypotheses.tsv").is_file()


def test_tensorboard_holds_scalars_and_text_samples(run: Path) -> None:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "train/lm", "train/clips_per_s", "train/data_wait", "dev/bleu4", "test/bleu4"} <= set(
        tags["scalars"]
    )
    assert "dev/samples/text_summary" in tags["tensors"]
    reported = {event.step for event in board.Scalars("train/loss")}
    assert reported == {*range(2, 21, 2), 21}


def test_translation_starts_from_the_pretrained_visual_encoder(run: Path) -> None:
    with safe_open(run.parent / "tiny_pretrain/export/model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("visual.")]  # noqa: SIM118
    with safe_open(run / "export/model.safetensors", framework="pt") as file:
        assert set(names) <= set(file.keys())
    assert "visual from" in (run / "log.txt").read_text()


def test_evaluate_repeats_the_scores_and_sacrebleu_agrees(run: Path, corpus, command: Command, tmp_path: Path) -> None:
    done = command(
        *("-m", "sltscale.cli", "evaluate", "--run", run, "--shards", corpus.shards),
        *("--split", "test", "--out", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    at_the_end = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert metrics == at_the_end

    with (tmp_path / "out/hypotheses.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == metrics["clips"]
    for column in ("hypothesis", "reference"):
        (tmp_path / column).write_text("".join(row[column] + "\n" for row in rows), encoding="utf-8")
    scored = subprocess.run(
        [sys.executable, "-m", "sacrebleu", tmp_path / "reference", "-i", tmp_path / "hypothesis"]
        + ["-m", "bleu", "chrf", "-b", "-w", "12"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    bleu, chrf = (
        float(number) for number in scored.stdout.replace("[", " ").replace("]", " ").replace(",", " ").split()
    )
    assert metrics["bleu4"] == pytest.approx(bleu, abs=1e-9)
    assert metrics["chrf"] == pytest.approx(chrf, abs=1e-9)


def test_retrieve_repeats_the_scores(run: Path, corpus, command: Command, tmp_path: Path) -> None:
    pretrained = run.parent / "tiny_pretrain"
    done = command(
        *("-m", "sltscale.cli", "retrieve", "--run", pretrained, "--shards", corpus.shards),
        *("--split", "test", "--out", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "metrics.json").read_text())
    assert ours == json.loads((pretrained / "evaluation/test/metrics.json").read_text())


def test_translate_files(run: Path, corpus, command: Command) -> None:
    videos = sorted((corpus.source / "videos").iterdir())[:2]
    done = command("-m", "sltscale.cli", "translate", "--run", run, *videos)
    assert done.returncode == 0, done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [str(video) for video in videos]
    refused = command("-m", "sltscale.cli", "translate", "--run", run, corpus.translate, videos[0])
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "translate.toml" in refused.stderr
    assert refused.stdout == done.stdout.splitlines(keepends=True)[0]


RETRIEVAL = """
base = "tiny.toml"
name = "tiny_retrieval"
[start]
recipe = "{pretrain}"
[data]
augment = "off"
[method]
name = "retrieval"
[method.encoder]
layers = 1
width = 24
heads = 2
feed_forward = 32
max_positions = 128
[[optim.groups]]
part = "visual"
frozen = true
"""


def test_retrieval_on_frozen_visual_tokens(run: Path, corpus, launcher: Launcher) -> None:
    """Under ZeRO-3. tiny_pretrain, beside ``run``, is finished and not repeated."""
    recipe = corpus.pretrain.with_name("retrieval.toml")
    recipe.write_text(RETRIEVAL.format(pretrain=corpus.pretrain))
    folder = run.parent / "tiny_retrieval"
    arguments = ["--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--recipe", str(recipe), "--run", str(folder)]
    launcher.check(TRAIN, arguments, ranks=2)
    metrics = json.loads((folder / "evaluation/test/metrics.json").read_text())
    assert 0 <= metrics["t2v_recall@1"] <= metrics["t2v_recall@5"] <= 100
    with (
        safe_open(run.parent / "tiny_pretrain/export/model.safetensors", framework="pt") as before,
        safe_open(folder / "export/model.safetensors", framework="pt") as after,
    ):
        visual = [name for name in before.keys() if name.startswith("visual.")]  # noqa: SIM118
        assert any("running_mean" in name for name in visual)
        assert all(before.get_tensor(name).equal(after.get_tensor(name)) for name in visual)
        trained = {name.split(".")[0] for name in after.keys()} - {"visual"}  # noqa: SIM118
    assert trained == {"projection", "video_encoder", "text_encoder", "logit_scale"}


def test_commands_refuse_the_other_kind_of_run(run: Path, corpus, command: Command, tmp_path: Path) -> None:
    places = ("--shards", corpus.shards, "--out", tmp_path)
    for verb, folder in (("evaluate", run.parent / "tiny_pretrain"), ("retrieve", run)):
        done = command("-m", "sltscale.cli", verb, "--run", folder, *places)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def test_a_finished_run_is_not_repeated(run: Path, corpus, launcher: Launcher) -> None:
    before = (run / "steps.jsonl").stat().st_mtime_ns
    output = launcher.check(
        TRAIN,
        ["--deepspeed", str(ZERO2), "--recipe", str(corpus.translate), "--run", str(run)]
        + ["--evaluation.every_epochs", "2"],
        ranks=1,
    )
    assert "already finished" in output
    assert (run / "steps.jsonl").stat().st_mtime_ns == before


def test_plain_webdataset_opens_the_tars(corpus) -> None:
    for split in ("train", "dev", "test"):
        tars = [str(path) for path in sorted(corpus.shards.glob(f"{split}-*.tar"))]
        samples = list(webdataset.WebDataset(tars, shardshuffle=False))
        assert samples
        for sample in samples:
            assert sample["mp4"][4:8] == b"ftyp"
            assert json.loads(sample["json"])["text"] == sample["txt"].decode()


def test_shards_verify_and_show(corpus, command: Command, tmp_path: Path) -> None:
    done = command("-m", "sltscale.cli", "shards", "verify", corpus.shards)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("no defects") == 3
    shown = command("-m", "sltscale.cli", "shards", "show", corpus.shards)
    rows = [json.loads(line) for line in shown.stdout.splitlines()]
    assert len(rows) == 60
    assert {"shard", "offset", "size", "frames", "fps", "text", "language", "split", "id", "sha256"} <= set(rows[0])
    missing = command("-m", "sltscale.cli", "shards", "verify", tmp_path)
    assert missing.returncode == 2
    assert "holds no index" in missing.stderr
