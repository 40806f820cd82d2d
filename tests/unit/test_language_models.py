"""Translation by mBART, mT5 and decoder-only models: token layouts, padding, decoding against transformers' own
``generate``, published weights, adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutput

from sltscale.config import (
    CausalSettings,
    GroupSettings,
    LanguageModelSettings,
    LoraSettings,
    MT5Settings,
    OptimSettings,
    ResNetSettings,
    TransformerSettings,
    TranslationSettings,
    VisualSettings,
)
from sltscale.engine.optim import freeze
from sltscale.errors import InputError
from sltscale.losses.seq2seq import label_smoothed_cross_entropy
from sltscale.methods.base import Vocabulary, build_method
from sltscale.methods.translation import Translation
from sltscale.models.causal import PrefixCoupling, build_causal
from sltscale.models.decoding import Coupling, beam_search, n_best
from sltscale.models.mbart import MBartCoupling, build_mbart
from sltscale.models.mt5 import MT5Coupling, build_mt5
from sltscale.models.sampling import sample
from sltscale.structures import Ragged, TextBatch, VideoBatch

SIZE, WIDTH = 40, 32
PROMPTS = ((7, 8, 9), (11,))  # of the languages 40 and 41
CODES = Vocabulary(SIZE, pad_id=1, eos_id=2)
PROMPTED = Vocabulary(SIZE, pad_id=1, eos_id=2, prompts=PROMPTS)
STARTED = Vocabulary(SIZE, pad_id=1, eos_id=2, prompts=PROMPTS, start=(3,))
NO_PADDING = Vocabulary(SIZE, pad_id=2, eos_id=2, prompts=PROMPTS)  # as of a tokenizer without a padding token

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH, "intermediate_size": 48}
PUBLISHED: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(vocab_size=44, num_key_value_heads=2, eos_token_id=[5, 2], **SMALL)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(vocab_size=44, num_key_value_heads=2, eos_token_id=2, **SMALL)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(vocab_size=44, num_key_value_heads=2, head_dim=8, eos_token_id=2, sliding_window=4, **SMALL),
    ),
    "xglm": (
        XGLMForCausalLM,
        XGLMConfig(vocab_size=44, d_model=WIDTH, num_layers=2, attention_heads=4, ffn_dim=48, dropout=0.0),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=44, n_embd=WIDTH, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=2, n_positions=128),
    ),
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=44, hidden_size=WIDTH, n_layer=2, n_head=4)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass
class Case:
    """A language model with weights so large that what it writes hangs on what it reads."""

    model: Any
    coupling: Coupling
    languages: Tensor
    ids_from: int  # of the languages in a TextBatch


def saved(name: str, folder: Path) -> str:
    model_class, config = PUBLISHED[name]
    model_class(config).save_pretrained(folder)
    return str(folder)


def case(name: str, folder: Path) -> Case:
    if name == "mbart":
        settings = LanguageModelSettings(
            width=WIDTH, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=48, dropout=0.0, attention_dropout=0
        )
        model, coupling, languages = build_mbart(settings, CODES), MBartCoupling(CODES), [33, 34, 33, 35]
        factors = {"encoder_attn.": 16.0, "": 4.0}
    elif name == "mt5":
        mt5 = MT5Settings(
            architecture="mt5", width=WIDTH, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=48, dropout=0.0
        )
        model, coupling, languages = build_mt5(mt5, CODES), MT5Coupling(CODES), [SIZE] * 4
        factors = {"EncDecAttention": 3.0, "lm_head": 0.2}
    else:
        vocabulary = NO_PADDING if name == "no padding" else STARTED if name in ("llama", "gemma2") else PROMPTED
        settings = {"width": WIDTH, "layers": 2, "heads": 4, "feed_forward": 48, "max_positions": 64}
        if name in PUBLISHED:
            settings = {"pretrained": saved(name, folder)}
        model = build_causal(CausalSettings(architecture="causal", **settings), vocabulary)
        coupling, languages = PrefixCoupling(vocabulary), [40, 41, 41, 40]
        factors = {"embed": 1.0, "wte": 1.0, "norm": 1.0, "ln_": 1.0, "": 8.0}
    for parameter_name, parameter in model.named_parameters():
        factor = next((factor for part, factor in factors.items() if part in parameter_name), 1.0)
        parameter.data.mul_(factor)
    return Case(model.eval(), coupling, torch.tensor(languages), 33 if name == "mbart" else SIZE)


NAMES = ["mbart", "mt5", "causal", "no padding", *PUBLISHED]
EACH = pytest.mark.parametrize("name", NAMES)
LENGTHS = (6, 2, 4, 1)
# Their masks do not go with float64, whose lowest number is -inf in the float32 of their softmax.
SINGLE = ("gemma2", "xglm", "bloom")


def read(lengths: tuple[int, ...] = LENGTHS, extra: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.randn(len(lengths), 6, WIDTH, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    pad = torch.nn.functional.pad
    return pad(values, (0, 0, 0, extra)), pad(mask, (0, extra))


def sentences(lengths: tuple[int, ...], languages: Tensor, extra: int = 0, pad: int = 1) -> TextBatch:
    """Sentences of so many steps, </s> and language id among them."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.full((len(lengths), max(lengths) + extra), pad)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        words = torch.randint(4, 30, (length - 2,), generator=generator)
        ids[row, :length] = torch.cat([words, torch.tensor([2]), languages[row : row + 1]])
        mask[row, :length] = 1
    return TextBatch(ids, mask)


@EACH
def test_padding_changes_neither_losses_nor_gradients(name: str, tmp_path: Path) -> None:
    found = case(name, tmp_path)
    dtype, tolerance = (torch.float32, 1e-3) if name in SINGLE else (torch.float64, 1e-8)
    model = found.model.to(dtype)
    losses, gradients = [], []
    for extra_steps, extra_tokens in ((0, 0), (3, 0), (0, 4)):
        model.zero_grad()
        values, mask = read(extra=extra_steps)
        text = sentences((5, 3, 7, 4), found.languages, extra_tokens, found.coupling.vocabulary.pad_id)
        logits, labels = found.coupling.logits(model, values.to(dtype), mask, text), found.coupling.labels(text)
        assert logits.shape[:2] == labels.shape
        loss = label_smoothed_cross_entropy(logits, labels, 0.1)
        loss.loss_sum.backward()
        assert int(loss.count) == (19 if name == "mbart" else 15)
        losses.append(loss.loss_sum.detach())
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    for other_loss, other in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(other_loss, losses[0], rtol=tolerance, atol=0)
        for key, gradient in gradients[0].items():
            assert torch.isfinite(gradient).all()
            scale = float(gradient.abs().max())
            assert float((other[key] - gradient).abs().max()) <= tolerance * (scale + 1e-3), key


@EACH
def test_a_batch_teaches_as_its_sentences_alone(name: str, tmp_path: Path) -> None:
    found = case(name, tmp_path)
    dtype, tolerance = (torch.float32, 1e-3) if name in SINGLE else (torch.float64, 1e-8)
    model, lengths = found.model.to(dtype), (5, 3, 7, 4)
    values, mask = read()
    text = sentences(lengths, found.languages, 0, found.coupling.vocabulary.pad_id)
    with torch.no_grad():
        together = found.coupling.logits(model, values.to(dtype), mask, text)
        labels = found.coupling.labels(text)
        for row, (steps, length) in enumerate(zip(LENGTHS, lengths, strict=True)):
            one = TextBatch(text.input_ids[row : row + 1, :length], text.attention_mask[row : row + 1, :length])
            part = slice(row, row + 1)
            alone = found.coupling.logits(model, values[part, :steps].to(dtype), mask[part, :steps], one)[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=tolerance, atol=tolerance)
            learnt = labels[row][labels[row] != -100].tolist()
            words = text.input_ids[row, : length - 1].tolist()
            assert learnt == (words + [int(found.languages[row])] if name == "mbart" else words)


def by_hand(found: Case, values: Tensor, mask: Tensor, language: int, **options: Any) -> list[int]:
    """One row's best sentence, by ``generate`` called directly on the layout written out."""
    model, vocabulary = found.model, found.coupling.vocabulary
    options |= {"do_sample": False, "eos_token_id": 2, "pad_token_id": vocabulary.pad_id}
    if isinstance(found.coupling, PrefixCoupling):
        prompt = model.get_input_embeddings()(torch.tensor([PROMPTS[language - SIZE]]))
        start = model.get_input_embeddings()(torch.tensor([vocabulary.start], dtype=torch.long))
        prefix = torch.cat([start, values, prompt], 1)
        options["suppress_tokens"] = sorted({vocabulary.pad_id, *range(SIZE, model.config.vocab_size)} - {2}) or None
        ids = model.generate(inputs_embeds=prefix, attention_mask=torch.ones(prefix.shape[:2]), **options)[0].tolist()
    else:
        hidden = model.get_encoder()(inputs_embeds=values, attention_mask=mask).last_hidden_state
        start = language if isinstance(found.coupling, MBartCoupling) else 1
        options["suppress_tokens"] = None if isinstance(found.coupling, MBartCoupling) else [1]
        encoded = BaseModelOutput(last_hidden_state=hidden)
        ids = model.generate(encoder_outputs=encoded, decoder_start_token_id=start, **options)[0].tolist()[1:]
    return ids[: ids.index(2)] if 2 in ids else ids


@EACH
@pytest.mark.parametrize("beams", [1, 4])
def test_what_is_written_in_a_batch_is_generates_own_row_by_row(name: str, beams: int, tmp_path: Path) -> None:
    found = case(name, tmp_path)
    values, mask = read()
    options = {"length_penalty": 0.8, "max_new_tokens": 9}
    with torch.no_grad():
        together = beam_search(found.model, found.coupling, values, mask, found.languages, beams=beams, **options)
        for row, steps in enumerate(LENGTHS):
            part = slice(row, row + 1)
            one, own = values[part, :steps], mask[part, :steps]
            assert together[row] == by_hand(found, one, own, int(found.languages[row]), num_beams=beams, **options)
            alone = beam_search(found.model, found.coupling, one, own, found.languages[part], beams=beams, **options)
            assert alone == [together[row]]
    assert len({tuple(ids) for ids in together}) > 1
    assert all(token < SIZE for ids in together for token in ids)


@EACH
@pytest.mark.parametrize(("beams", "n"), [(1, 1), (4, 3)])
def test_scores_are_those_of_teacher_forcing(name: str, beams: int, n: int, tmp_path: Path) -> None:
    """So what is decoded is what was trained, positions and prompt included."""
    found = case(name, tmp_path)
    values, mask = read()
    options = {"length_penalty": 0.8, "max_new_tokens": 9}
    best = n_best(found.model, found.coupling, values, mask, found.languages, beams=beams, n=n, **options)
    for row, hypotheses in enumerate(best):
        assert len(hypotheses) == n
        for one in hypotheses:
            written = [*one.ids, 2][: options["max_new_tokens"]]
            language = int(found.languages[row])
            ids = torch.tensor([[*written, language] if written[-1] == 2 else [*written, 2, language]])
            part = slice(row, row + 1)
            with torch.no_grad():
                text = TextBatch(ids, torch.ones_like(ids))
                logits = found.coupling.logits(found.model, values[part], mask[part], text)[0]
            if isinstance(found.coupling, MBartCoupling):
                logits = logits[:-1]
            steps = logits.float().log_softmax(-1)[range(len(written)), written]
            assert one.score == pytest.approx(float(steps.sum()) / len(written) ** 0.8, abs=2e-4)


# --- sampling --------------------------------------------------------------------------------------------------------

DRAWN = {"temperature": 0.9, "top_p": 0.95, "length_penalty": 0.8, "max_new_tokens": 6}


@pytest.mark.parametrize("name", ["mbart", "mt5", "causal"])
def test_what_a_seed_draws_hangs_on_its_row_alone(name: str, tmp_path: Path) -> None:
    found = case(name, tmp_path)
    values, mask = read()
    seeds = [[row, 100 + row] for row in range(4)]
    together = sample(found.model, found.coupling, values, mask, found.languages, seeds=seeds, **DRAWN)
    assert len({tuple(one.ids) for row in together for one in row}) > 4
    for row, steps in enumerate(LENGTHS):
        part = slice(row, row + 1)
        alone = []
        for seed in seeds[row]:
            one = values[part, :steps], mask[part, :steps], found.languages[part]
            alone += sample(found.model, found.coupling, *one, seeds=[[seed]], **DRAWN)[0]
        assert [one.ids for one in together[row]] == [
            one.ids for one in sorted(alone, key=lambda hypothesis: -hypothesis.score)
        ]


def test_tokens_are_drawn_by_their_probabilities(tmp_path: Path) -> None:
    """The first token of 4000 sentences of one video, and the score of each, against the softmax."""
    found = case("causal", tmp_path)
    values, mask = (each[:1] for each in read())
    text = sentences((3,), found.languages[:1])
    with torch.no_grad():
        logits = found.coupling.logits(found.model, values, mask, text)[0, 0].double()
    scores = logits.log_softmax(-1)
    logits[found.coupling.never_written(found.model)] = -torch.inf
    options = DRAWN | {"max_new_tokens": 1, "length_penalty": 1.0}
    for temperature, top_p in ((1.0, 1.0), (2.5, 1.0), (2.5, 0.7)):
        expected = (logits / temperature).softmax(-1)
        order = expected.argsort(descending=True)
        left_out = order[expected[order].cumsum(0) - expected[order] >= top_p]
        expected[left_out] = 0
        expected /= expected.sum()
        options |= {"temperature": temperature, "top_p": top_p}
        seeds = [[*range(4000)]]
        (drawn,) = sample(found.model, found.coupling, values, mask, found.languages[:1], seeds=seeds, **options)
        counts = torch.zeros(len(logits), dtype=torch.float64)
        for one in drawn:
            token = one.ids[0] if one.ids else 2
            counts[token] += 1
            assert one.score == pytest.approx(float(scores[token]), abs=1e-3)
        assert counts[left_out].sum() == 0
        deviation = (counts - 4000 * expected).abs() / (4000 * expected * (1 - expected)).sqrt().clamp(min=1)
        assert deviation.max() < 5
        assert (counts > 0).sum() > 3


# --- adapters and frozen parts ---------------------------------------------------------------------------------------

VISUAL = VisualSettings(
    frames=ResNetSettings(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1)),
    transformer=TransformerSettings(layers=1, width=24, heads=4, feed_forward=32, dropout=0.0, max_positions=32),
)
CAUSAL = CausalSettings(architecture="causal", width=WIDTH, layers=2, heads=4, feed_forward=48, max_positions=64)
MT5 = MT5Settings(architecture="mt5", width=WIDTH, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=48)
MBART = LanguageModelSettings(width=WIDTH, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=48)


def example(language: int = SIZE) -> tuple[VideoBatch, TextBatch]:
    frames = torch.randint(0, 256, (18, 48, 32), dtype=torch.uint8)
    names = ["a", "b", "c", "d"]
    batch = VideoBatch(names, Ragged.from_lengths(frames, [5, 1, 9, 3]), names, ["de"] * 4)
    return batch, sentences((7, 3, 5, 4), torch.tensor([language, language + 1, language, language]))


def translation(language_model: Any, **settings: Any) -> Translation:
    method = build_method(
        TranslationSettings(name="translation", visual=VISUAL, language_model=language_model, **settings), PROMPTED
    )
    assert isinstance(method, Translation)
    return method


@pytest.mark.parametrize("settings", [MT5, CAUSAL], ids=["mt5", "causal"])
def test_every_parameter_learns(settings: Any) -> None:
    method = translation(settings)
    batch, text = example()
    losses = method(batch, text)
    assert int(losses["lm"].count) == int(method.counts(text)["lm"]) == 7 + 3 + 5 + 4 - 4
    losses["lm"].loss_sum.backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    checkpointed = translation(settings.model_copy(update={"checkpoint_activations": True}))
    checkpointed.load_state_dict(method.state_dict())
    for both in (method, checkpointed):
        both.language_model.eval()  # no dropout
        both.zero_grad()
        both(batch, text)["lm"].loss_sum.backward()
    for (name, one), other in zip(method.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("settings", [MBART, MT5, CAUSAL], ids=["mbart", "mt5", "causal"])
def test_adapters_on_attention(settings: Any) -> None:
    """Only they learn in the language model, nothing frozen gets a gradient, and nothing changes at first."""
    torch.manual_seed(1)
    plain = translation(settings).eval()
    torch.manual_seed(1)
    method = translation(settings, lora=LoraSettings(rank=2, alpha=4, dropout=0.0))
    trained = {name for name, p in method.language_model.named_parameters() if p.requires_grad}
    layers = {name.split(".lora_")[0].split(".")[-1] for name in trained}
    assert (
        layers
        == {
            "mbart": {"q_proj", "k_proj", "v_proj", "out_proj"},
            "mt5": set("qkvo"),
            "causal": {"q_proj", "k_proj", "v_proj", "o_proj"},
        }[settings.architecture]
    )
    own = {name.replace(".base_layer", ""): p for name, p in method.state_dict().items() if ".lora_" not in name}
    plain.load_state_dict(own)
    batch, text = example(33 if settings is MBART else SIZE)
    with torch.no_grad():
        one, other = (each.eval()(batch, text)["lm"].loss_sum for each in (plain, method))
    torch.testing.assert_close(other, one)
    method(batch, text)["lm"].loss_sum.backward()
    for name, parameter in method.language_model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    assert all(p.grad is not None for p in method.visual.parameters())


def test_adapters_on_named_layers_and_unknown_names() -> None:
    lora = LoraSettings(rank=2, alpha=4)
    method = translation(CAUSAL, lora=lora, lora_modules=("down_proj",))
    trained = {name.split(".lora_")[0] for name, p in method.language_model.named_parameters() if p.requires_grad}
    assert trained == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    with pytest.raises(InputError, match=r"no linear layer called query; it has .*down_proj, .*q_proj") as raised:
        translation(CAUSAL, lora=lora, lora_modules=("q_proj", "query"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [MT5, CAUSAL], ids=["mt5", "causal"])
def test_a_language_model_frozen_by_rule(settings: Any) -> None:
    method = translation(settings)
    freeze(method, OptimSettings(name="adam", lr=1e-3, groups=(GroupSettings(part="language_model", frozen=True),)))
    method(*example())["lm"].loss_sum.backward()
    assert all(p.grad is None for p in method.language_model.parameters())
    assert all(p.grad is not None for p in (*method.visual.parameters(), *method.projection.parameters()))


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_sequences_longer_than_the_model() -> None:
    method = translation(CAUSAL.model_copy(update={"max_positions": 16})).eval()
    batch, text = example()
    with pytest.raises(InputError, match="are 17 steps, the language model has 16 positions"):
        method(batch, text)
    languages, options = torch.tensor([40, 41, 40, 40]), {"beams": 1, "length_penalty": 1.0}
    with pytest.raises(InputError, match="max_new_tokens 8 does not fit beside 12 steps of video and prompt"):
        method.generate(batch.frames, languages, max_new_tokens=8, **options)
    assert len(method.generate(batch.frames, languages, max_new_tokens=3, **options)) == 4


def test_weights_of_another_vocabulary(tmp_path: Path) -> None:
    settings = CausalSettings(architecture="causal", pretrained=saved("llama", tmp_path / "llama"))
    with pytest.raises(InputError, match=r"has 44 token ids and end \[5, 2\]; the tokenizer has 45 and 2"):
        build_causal(settings, Vocabulary(45, 1, 2))
    with pytest.raises(InputError, match=r"has 44 token ids and end \[5, 2\]; the tokenizer has 40 and 3"):
        build_causal(settings, Vocabulary(40, 1, 3))
    build_mt5(MT5, CODES).save_pretrained(tmp_path / "mt5")
    of_mt5 = MT5.model_copy(update={"pretrained": str(tmp_path / "mt5")})
    with pytest.raises(InputError, match=r"has 40 token ids, padding 1 and end 2; the tokenizer has 40, 0 and 2"):
        build_mt5(of_mt5, Vocabulary(40, 0, 2))
    with pytest.raises(InputError, match=r"config\.json and model\.safetensors of a AutoModelForCausalLM"):
        build_causal(settings.model_copy(update={"pretrained": str(tmp_path / "mt5")}), CODES)
