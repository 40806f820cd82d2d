"""Started by test_forecast.py where there is a GPU: the most memory that two steps take there, beside the forecast."""

from __future__ import annotations

import json

import torch

from sltscale.data.text import build_corpus_tokenizer
from sltscale.engine.deepspeed_engine import build_engine, start_processes
from sltscale.engine.global_loss import global_loss
from sltscale.engine.signals import leave
from sltscale.forecast.fitting import Fitting
from sltscale.forecast.states import EngineSetting
from sltscale.forecast.workload import assume_corpus
from sltscale.methods import export
from sltscale.methods.base import Vocabulary
from sltscale.recipe_files import load_recipe
from sltscale.structures import Ragged, VideoBatch

CLIPS, FRAMES = 8, 75
SENTENCE = "morgen kommt der regen und die sonne geht nach hause"
SETTINGS = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000}, "bf16": {"enabled": True}}


def main() -> None:
    device = start_processes()
    recipe = load_recipe("c2rl_pretrain", ["--data.global_batch", str(CLIPS), "--text.vocabulary", "60"])
    tokenizer = build_corpus_tokenizer([SENTENCE], ["de"], 60)
    size = recipe.data.crop_size
    frames = torch.randint(0, 256, (CLIPS * FRAMES, size * 3 // 2, size), dtype=torch.uint8)
    names = [str(number) for number in range(CLIPS)]
    batch = VideoBatch(names, Ragged.from_lengths(frames, [FRAMES] * CLIPS), [SENTENCE] * CLIPS, ["de"] * CLIPS)
    text = tokenizer.encode(batch.texts, batch.languages)

    corpus = assume_corpus(recipe, None, FRAMES, int(text.attention_mask.sum()) // CLIPS)
    vocabulary = Vocabulary(tokenizer.size, tokenizer.pad_id, tokenizer.eos_id)
    setting = EngineSetting.of(SETTINGS)
    fitting = Fitting(recipe, vocabulary, corpus, 1, 10**12, setting)
    forecast = fitting.case(setting, fitting.own_policy).peak

    engine = build_engine(export.build(recipe, tokenizer).to(device), recipe.optim, SETTINGS)
    engine.train()
    for step in range(2):
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        outputs = engine(batch.to(device), text.to(device))
        engine.backward(global_loss(outputs, engine.module.weights, batch, False)[0])
        del outputs
        engine.step()
    print(json.dumps({"forecast": forecast, "found": torch.cuda.max_memory_allocated()}), flush=True)


if __name__ == "__main__":
    main()
    leave(0)
