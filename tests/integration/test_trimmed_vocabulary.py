"""A published mBART, cut to the corpus, in a recipe: from shards to metrics through the real commands."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, Launcher
from mbart_files import OTHER_TEXT, train_sentencepiece, write_model, write_tokenizer_json
from safetensors import safe_open
from transformers import AutoTokenizer

from sltscale.data.shards.index import open_index
from sltscale.data.text import build_corpus_tokenizer

Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.multiprocess


@pytest.mark.slow
def test_a_recipe_on_a_trimmed_mbart(corpus, command: Command, launcher: Launcher, tmp_path: Path) -> None:
    full, trimmed, run = tmp_path / "full", tmp_path / "trimmed", tmp_path / "run"
    train_sentencepiece(full, [*open_index(corpus.shards, "train").texts(), *OTHER_TEXT * 3], 300)
    write_tokenizer_json(full)
    before = len(AutoTokenizer.from_pretrained(full))
    write_model(full, before, max_position_embeddings=128)
    (full / "tokenizer.json").unlink()  # as downloads of mBART often are: the sentencepiece model alone
    done = command(
        *("-m", "sltscale.cli", "vocab", "trim", full, "--corpus", corpus.shards, "--model", full, "--out", trimmed)
    )
    assert done.returncode == 0, done.stderr
    ids = len(json.loads((trimmed / "kept_ids.json").read_text()))
    assert ids < before - 30
    output = launcher.check(
        ROOT / "sltscale/train.py",
        ["--deepspeed", str(ROOT / "ds_configs/zero2.json"), "--recipe", str(corpus.translate), "--run", str(run)]
        + ["--start", "none", "--text.tokenizer", str(trimmed), "--train.epochs", "1"]
        + ["--method.language_model.pretrained", str(trimmed), "--evaluation.append_period", "true"]
        + ["--text.max_tokens", "7"],
        ranks=2,
    )
    texts = open_index(corpus.shards, "train").texts()
    backend = AutoTokenizer.from_pretrained(trimmed)
    longer = sum(len(backend.encode(text, add_special_tokens=False)) > 5 for text in texts)  # and </s>, language code
    warning = f"{longer} of {len(texts)} training sentences are longer than text.max_tokens 7 and lose their end"
    assert longer and warning in output
    with safe_open(run / "export/model.safetensors", framework="pt") as file:
        assert file.get_slice("language_model.model.shared.weight").get_shape() == [ids, 16]
    metrics = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert metrics["clips"] > 0
    assert metrics["signature"]["convention"] == "13a|level:word|period:appended"
    assert metrics["bleu4_without_period"] <= metrics["bleu4"]


def test_a_tokenizer_without_the_corpus_language(corpus, command: Command, tmp_path: Path) -> None:
    build_corpus_tokenizer(open_index(corpus.shards, "train").texts(), ["zh"], 200).save(tmp_path / "zh")
    done = command(
        *("sltscale/train.py", "--deepspeed", ROOT / "ds_configs/zero2.json", "--recipe", corpus.translate),
        *("--start", "none", "--run", tmp_path / "run", "--text.tokenizer", tmp_path / "zh"),
    )
    assert done.returncode == 2
    assert "error: the tokenizer has no code for language 'de'; it knows: zh\n" in done.stderr
    assert not (tmp_path / "run").exists()
