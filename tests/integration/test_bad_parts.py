"""A tokenizer, a lexicon, weights that do not belong to a run: one line, exit code 2. And what a corpus may well hold:
sentences that are too long, clips of one frame and clips above the limit."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from launching import ROOT
from safetensors.torch import save_file

from sltscale.data.lexicon import build_lexicon
from sltscale.data.shards.index import open_index
from sltscale.data.tagging import tagger
from sltscale.data.text import build_corpus_tokenizer
from sltscale.data.word_vectors import corpus_vectors

Command = Callable[..., subprocess.CompletedProcess[str]]
HFA = ("hfa_pretrain_tiny", "--method.visual.frames.image_size", "28", "--data.synthetic", "none")
pytestmark = pytest.mark.slow


def train(command: Command, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return command("sltscale/train.py", "--deepspeed", ROOT / "ds_configs/zero0.json", "--recipe", *arguments)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if "real_accelerator" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stdout + done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def pretrained(corpus, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of C2RL's pretraining, one epoch."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    done = train(command, corpus.pretrain, "--run", run, "--train.epochs", "1")
    assert done.returncode == 0, done.stderr
    return run


def lexicon(texts: Sequence[str], width: int, folder: Path) -> Path:
    def vectors(glosses: Sequence[str], found: Sequence[list[str]]):
        return corpus_vectors(glosses, found, width)

    build_lexicon(texts, tagger("words").analyse, vectors).save(folder)
    return folder


def test_a_tokenizer_without_the_corpus_language(corpus, command: Command, tmp_path: Path) -> None:
    texts = open_index(corpus.shards, "train").texts()
    build_corpus_tokenizer(texts, ["zh"] * len(texts), 120, 64).save(tmp_path / "tokenizer")
    done = train(command, corpus.pretrain, "--run", tmp_path / "run", "--text.tokenizer", tmp_path / "tokenizer")
    line = refusal(done)
    assert "language 'de'; it knows: zh" in line
    assert not (tmp_path / "run").exists()


def test_a_lexicon_of_other_sentences_or_another_width(corpus, command: Command, tmp_path: Path) -> None:
    texts = open_index(corpus.shards, "train").texts()
    short, narrow = lexicon(texts[:5], 16, tmp_path / "short"), lexicon(texts, 5, tmp_path / "narrow")
    options = ("--data.shards", corpus.shards, "--data.frame_size", "32", "--data.crop_size", "28")
    for folder, expected in ((short, r"knows \d+ of \d+ training sentences"), (narrow, "width 5, the model .* width")):
        line = refusal(train(command, *HFA, *options, "--run", tmp_path / "run", "--method.lexicon", folder))
        assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()


def test_weights_of_another_system_or_size(corpus, pretrained: Path, command: Command, tmp_path: Path) -> None:
    """Which parts there are is said, or which tensor has which shape."""
    given = ("--run", tmp_path / "run", "--start.recipe", "none", "--start.run")
    options = ("--data.shards", corpus.shards, "--data.frame_size", "32", "--data.crop_size", "28")
    line = refusal(train(command, "gfslt_slt_tiny", "--data.synthetic", "none", *options, *given, pretrained))
    assert "(method c2rl), part visual.frames: weights do not fit the model: missing resnet" in line
    line = refusal(train(command, corpus.translate, *given, pretrained, "--method.visual.transformer.width", "32"))
    assert "of another shape linear.bias [16] instead of [32]" in line
    other = tmp_path / "other"
    shutil.copytree(pretrained / "export", other / "export")
    save_file({"something.else": torch.zeros(3)}, other / "export/model.safetensors")
    line = refusal(train(command, corpus.translate, *given, other))
    assert "holds no part visual; it holds something" in line
    assert not (tmp_path / "run").exists()


def test_long_sentences_are_cut_and_counted(corpus, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(command, corpus.pretrain, "--run", run, "--train.epochs", "1", "--text.max_tokens", "4")
    assert done.returncode == 0, done.stderr
    index = open_index(corpus.shards, "train")
    found = re.search(
        rf"warning: (\d+) of {len(index)} training sentences are longer than text.max_tokens 4", done.stdout
    )
    assert found and 0 < int(found[1]) <= len(index), done.stdout


@pytest.mark.parametrize("option", [("--data.sampling_rate", "0.001"), ("--data.max_frames", "3")])
def test_clips_of_one_frame_and_clips_above_the_limit(
    option: tuple[str, str], corpus, command: Command, tmp_path: Path
) -> None:
    """Less than the temporal kernel takes, and thinned; scored twice, with the same numbers."""
    run = tmp_path / "run"
    done = train(command, corpus.pretrain, "--run", run, "--train.epochs", "1", *option)
    assert done.returncode == 0, done.stderr
    scored = json.loads((run / "evaluation/test/metrics.json").read_text())
    again = command(
        "-m", "sltscale.cli", "retrieve", "--run", run, "--shards", corpus.shards, "--out", tmp_path / "again"
    )
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == scored
