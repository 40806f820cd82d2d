"""Translation by a decoder-only language model and by mT5, from shards to metrics through the real commands."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, Launcher
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sltscale.data.shards.index import open_index

Command = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.multiprocess
TRAIN = ROOT / "sltscale/train.py"
SMALL = "width = 16, heads = 2, feed_forward = 32"


def save_llama(folder: Path, texts: list[str]) -> None:
    """As on the hub: weights in safetensors, and a byte-level tokenizer that has no padding and no language codes."""
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[*special.values()], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=352, eos_token_id=1, **sizes)).save_pretrained(folder)


def options(corpus, run: Path, stage: int, language_model: str) -> list[str]:
    return [
        *("--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json"), "--recipe", str(corpus.translate)),
        *("--run", str(run), "--start", "none", "--train.epochs", "1", "--train.checkpoint_every", "3"),
        *("--method.language_model", language_model),
    ]


@pytest.mark.slow
def test_adapters_in_a_published_decoder_only_model(
    corpus, launcher: Launcher, command: Command, tmp_path: Path
) -> None:
    llama, run = tmp_path / "llama", tmp_path / "run"
    save_llama(llama, open_index(corpus.shards, "train").texts())
    arguments = options(corpus, run, 2, f'{{architecture = "causal", pretrained = "{llama}"}}')
    arguments += ["--text.tokenizer", str(llama), "--method.lora", "{rank = 2, alpha = 4}"]
    arguments += ["--evaluation.sampling", "{temperature = 0.8, top_p = 0.9}"]
    launcher.check(TRAIN, arguments, ranks=2, cwd=tmp_path)
    metrics = json.loads((run / "evaluation/test/metrics.json").read_text())
    assert metrics["clips"] > 0 and 0 <= metrics["bleu4"] <= 100
    assert (metrics["temperature"], metrics["top_p"]) == (0.8, 0.9)

    with (
        safe_open(llama / "model.safetensors", framework="pt") as published,
        safe_open(run / "export/model.safetensors", framework="pt") as exported,
    ):
        base = "model.layers.0.self_attn.q_proj"
        kept = exported.get_tensor(f"language_model.{base}.base_layer.weight")
        assert kept.equal(published.get_tensor(f"{base}.weight"))
        assert exported.get_tensor(f"language_model.{base}.lora_B.default.weight").abs().max() > 0

    # What was drawn by two ranks, one process draws again.
    again = command(
        *("-m", "sltscale.cli", "evaluate", "--run", run, "--shards", corpus.shards, "--out", tmp_path / "again")
    )
    assert again.returncode == 0, again.stderr
    hypotheses = [place.read_text() for place in (tmp_path / "again", run) for place in place.rglob("hypotheses.tsv")]
    assert len(hypotheses) == 2 and hypotheses[0] == hypotheses[1]

    clips = tmp_path / "clips"
    clips.mkdir()
    for video in sorted((corpus.source / "videos").iterdir())[:2]:
        shutil.copy(video, clips)
    translate = ("-m", "sltscale.cli", "translate", "--run", run, "--n-best", "2", "--json")
    done = command(*translate, "--language", "de", clips)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    drawn = [[sentence["text"] for sentence in row["sentences"]] for row in rows]
    assert [len(set(texts)) for texts in drawn] == [2, 2] and drawn[0] != drawn[1]
    done = command(*translate, "--language", "fr", clips)
    assert done.returncode == 2
    assert "error: there is no prompt for language 'fr', only for: de, en, zh; give one as method" in done.stderr
    assert "error: the run knows de, en, zh; choose one with --language" in command(*translate, clips).stderr


def test_a_corpus_in_a_language_without_a_prompt(corpus, command: Command, tmp_path: Path) -> None:
    language_model = f'{{architecture = "causal", layers = 1, {SMALL}, prompts = {{en = "In English:"}}}}'
    done = command(TRAIN, *options(corpus, tmp_path / "run", 2, language_model))
    assert done.returncode == 2
    assert "error: there is no prompt for language 'de', only for: en; give one as method" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "language_model",
    [
        f'{{architecture = "mt5", encoder_layers = 1, decoder_layers = 1, {SMALL}}}',
        f'{{architecture = "causal", layers = 1, {SMALL}, max_positions = 300}}',
    ],
    ids=["mt5", "causal"],
)
def test_all_of_a_random_model_at_zero_3(
    language_model: str, corpus, launcher: Launcher, command: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher.check(TRAIN, options(corpus, run, 3, language_model), ranks=2, cwd=tmp_path)
    assert json.loads((run / "evaluation/test/metrics.json").read_text())["clips"] > 0
    clip = min((corpus.source / "videos").iterdir())
    # mT5 is told no language, so none has to be chosen; the other knows several.
    told = ("--language", "de") if "causal" in language_model else ()
    done = command("-m", "sltscale.cli", "translate", "--run", run, *told, clip)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{clip}\t")
