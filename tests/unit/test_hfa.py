"""HFA: published sizes, what learns and what does not, and the references' faults that it does not have."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sltscale.config import (
    DinoSettings,
    HFAPretrainingSettings,
    HFATranslationSettings,
    HFAVisualSettings,
    LanguageModelSettings,
    LocalTemporalSettings,
)
from sltscale.data.lexicon import Lexicon, build_lexicon
from sltscale.data.tagging import tagger
from sltscale.data.text import build_corpus_tokenizer
from sltscale.engine.optim import build_optimizer, evaluate_frozen
from sltscale.errors import InputError
from sltscale.methods import export
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.methods.hfa import HFAPretraining, HFATranslation
from sltscale.models.dino import DinoEncoder
from sltscale.recipe_files import load_recipe
from sltscale.structures import LossOutput, Ragged, TextBatch, VideoBatch

VISUAL = HFAVisualSettings(
    frames=DinoSettings(width=16, layers=2, heads=2, image_size=42, lora_blocks=1),
    temporal=LocalTemporalSettings(
        width=16, heads=2, feed_forward=24, layers=(1, 1), output_width=16, dropout=0.0, drop_path=0.0, layer_scale=1.0
    ),
)
LANGUAGE_MODEL = LanguageModelSettings(
    width=16, encoder_layers=2, decoder_layers=1, heads=2, feed_forward=24, dropout=0.0, attention_dropout=0.0
)
NO_DROPOUT = {"rank": 2, "alpha": 4, "dropout": 0.0}
PRETRAINING = HFAPretrainingSettings.model_validate(
    {
        "name": "hfa_pretraining",
        "visual": VISUAL.model_dump() | {"frames": {**VISUAL.frames.model_dump(), "lora": NO_DROPOUT}},
        "language_model": LANGUAGE_MODEL.model_dump(),
        "lora": NO_DROPOUT,
        "head_width": 8,
        "head_dropout": 0.0,
    }
)
TRANSLATION = HFATranslationSettings(
    name="hfa_translation", visual=PRETRAINING.visual, language_model=LANGUAGE_MODEL, lora=PRETRAINING.lora
)
VOCABULARY = Vocabulary(size=40, pad_id=1, eos_id=2, pseudo_glosses=5)
LEXICON = Lexicon(
    glosses=("a", "b", "c", "d", "e"),
    of_sentence={"0": (1, 3), "1": (0,), "2": ()},
    vectors=np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32),
)
BOTH = pytest.mark.parametrize("settings", [PRETRAINING, TRANSLATION], ids=["pretraining", "translation"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def example(clip_lengths: list[int], text_lengths: list[int], extra: int = 0) -> tuple[VideoBatch, TextBatch]:
    frames = torch.randint(0, 256, (sum(clip_lengths), 42, 28), dtype=torch.uint8)
    ids = torch.full((len(text_lengths), max(text_lengths) + extra), VOCABULARY.pad_id)
    for row, length in enumerate(text_lengths):
        sentence = [*torch.randint(4, 36, (length - 2,)).tolist(), VOCABULARY.eos_id, 36]
        ids[row, :length] = torch.tensor(sentence)
    names = [str(row) for row in range(len(clip_lengths))]
    batch = VideoBatch(names, Ragged.from_lengths(frames, clip_lengths), names, ["de"] * len(names))
    return batch, TextBatch(ids, (ids != VOCABULARY.pad_id).long())


def built(settings: HFAPretrainingSettings | HFATranslationSettings, *, awake: bool = True) -> Method:
    """awake: LoRA with random second matrices, as they are after a step; zeros would hide half of every gradient."""
    method = build_method(settings, VOCABULARY)
    if isinstance(method, HFAPretraining) and "pseudo_gloss" in method.weights:
        method.use_lexicon(LEXICON)
    for name, parameter in method.named_parameters():
        if awake and ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return method


def total(method: Method, losses: dict[str, LossOutput]) -> Tensor:
    return torch.stack([method.weights[part] * loss.loss_sum / loss.count for part, loss in losses.items()]).sum()


def outcome(method: Method, batch: VideoBatch, text: TextBatch) -> dict[str, Tensor]:
    """Loss sums and gradients."""
    method.zero_grad()
    losses = method(batch, text)
    total(method, losses).backward()
    gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return {part: loss.loss_sum.detach() for part, loss in losses.items()} | gradients


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def sizes(settings: HFAPretrainingSettings | HFATranslationSettings, vocabulary: Vocabulary) -> tuple[int, int]:
    """(trainable, all parameters, unread embeddings of the publication among them)."""
    with torch.device("meta"):
        method = build_method(settings, vocabulary)
    parameters = list(method.parameters())
    unread = sum(method.unread_embeddings.values())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + unread


# --- the published model ---------------------------------------------------------------------------------------------


def test_published_sizes() -> None:
    """arXiv 2507.06732 table 3, for 2322 pseudo-glosses and 2172 token ids."""
    vocabulary = Vocabulary(2172, 1, 2, pseudo_glosses=2322)
    assert sizes(HFAPretrainingSettings(name="hfa_pretraining"), vocabulary) == (15_200_325, 346_123_973)
    for mapper in ("linear_ln_gelu", "linear_bn_relu"):
        settings = HFATranslationSettings(name="hfa_translation", mapper=mapper)
        assert sizes(settings, vocabulary) == (16_819_712, 395_924_608)
    bare = HFATranslationSettings(name="hfa_translation", mapper="linear")
    assert sizes(bare, vocabulary)[0] == 16_819_712 - 2048


def test_switches_change_what_learns() -> None:
    base = sizes(PRETRAINING, VOCABULARY)
    learned = sizes(PRETRAINING.model_copy(update={"learn_temperatures": True}), VOCABULARY)
    assert learned == (base[0] + 2, base[1] + 2)
    fixed = sizes(PRETRAINING.model_copy(update={"train_prototypes": False}), VOCABULARY)
    assert fixed == (base[0] - 5 * 8, base[1])
    only = build_method(PRETRAINING.model_copy(update={"alignment": 0.0}), VOCABULARY)
    assert {name for name, _ in only.named_children()} == {"visual", "head"}
    only = build_method(PRETRAINING.model_copy(update={"pseudo_gloss": 0.0}), VOCABULARY)
    assert {name for name, _ in only.named_children()} == {"visual", "text_encoder", "video_encoder", "logit_scale"}


@BOTH
def test_contract(settings: HFAPretrainingSettings | HFATranslationSettings) -> None:
    method = built(settings)
    batch, text = example([5, 1, 8, 2], [7, 3, 5, 4])
    losses = method(batch, text)
    assert losses.keys() == method.weights.keys()
    counts = method.counts(text)
    for part, loss in losses.items():
        assert loss.loss_sum.dim() == 0 and int(loss.count) == int(counts[part]), part
    total(method, losses).backward()
    for name, parameter in method.named_parameters():
        assert parameter.dim() > 0, name
        learns = parameter.grad is not None and bool(parameter.grad.isfinite().all() and parameter.grad.any())
        assert learns == parameter.requires_grad, name


def test_rank_0_trains_the_model_itself() -> None:
    whole = PRETRAINING.lora.model_copy(update={"rank": 0})
    frames = VISUAL.frames.model_copy(update={"lora": whole})
    visual = VISUAL.model_copy(update={"frames": frames})
    translation = build_method(TRANSLATION.model_copy(update={"visual": visual, "lora": whole}), VOCABULARY)
    frozen = {name for name, p in translation.named_parameters() if not p.requires_grad}
    assert {name.split(".")[3] for name in frozen} == {"embeddings", "encoder", "layernorm"}
    assert {name.split(".")[5] for name in frozen if ".layer." in name} == {"0"}
    pretraining = build_method(PRETRAINING.model_copy(update={"lora": whole}), VOCABULARY)
    assert all(p.requires_grad for p in pretraining.get_submodule("video_encoder").parameters())
    assert not any(p.requires_grad for p in pretraining.get_submodule("text_encoder").parameters())


def test_alignment_is_the_divergence_from_softmax_10_both_ways() -> None:
    method = built(PRETRAINING).eval()
    assert isinstance(method, HFAPretraining)
    batch, text = example([4, 2, 7], [6, 3, 5])
    with torch.no_grad():
        loss = method(batch, text)["alignment"]
        video, text_features = method.encode_video(batch.frames)[0][:, 0], method.encode_text(text)[0][:, 0]
        ones = torch.ones(3, 1)
        logits = method.similarity(video[:, None], ones, text_features[:, None], ones) / 0.07
    wanted = (10 * torch.eye(3)).softmax(1)
    both = [(wanted * (wanted.log() - z.log_softmax(1))).sum(1).mean() for z in (logits, logits.T)]
    assert (loss.loss_sum / loss.count).item() == pytest.approx(sum(both).item() / 2, rel=1e-5)
    assert loss.metrics["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-5)


@BOTH
def test_the_loss_falls(settings: HFAPretrainingSettings | HFATranslationSettings) -> None:
    # random embeddings of the usual 0.02 would leave a frozen output layer no room to say anything
    language_model = LANGUAGE_MODEL.model_copy(update={"init_std": 0.25})
    method = built(settings.model_copy(update={"language_model": language_model}), awake=False)
    batch, text = example([5, 2, 6, 3], [7, 3, 5, 4])
    frozen = {name: p.clone() for name, p in method.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for _ in range(30):
        loss = total(method, method(batch, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[0] - 0.3
    assert all(p.equal(frozen[name]) for name, p in method.named_parameters() if name in frozen)


# --- the references' faults ------------------------------------------------------------------------------------------


@BOTH
def test_extra_padding_changes_nothing(settings: HFAPretrainingSettings | HFATranslationSettings) -> None:
    method = built(settings).double()
    results = []
    for extra_text, longest in ((0, 9), (5, 9), (0, 16)):
        torch.manual_seed(1)
        batch, text = example([5, 1, 9, 4], [7, 3, 5, 4], extra_text)
        frames = Ragged(batch.frames.values, batch.frames.cu_seqlens, longest)
        results.append(outcome(method, VideoBatch(batch.ids, frames, batch.texts, batch.languages), text))
    same(results[0], results[1])
    same(results[0], results[2])


def test_the_references_pooling_counts_padding() -> None:
    method = built(PRETRAINING.model_copy(update={"pool_masked": False, "pool_cls": True})).double()
    found = []
    for extra in (0, 5):
        torch.manual_seed(1)
        batch, text = example([5, 1, 9, 4], [7, 3, 5, 4], extra)
        found.append(method(batch, text)["alignment"].loss_sum)
    assert abs(found[0] - found[1]) > 1e-4


def test_pooling_of_the_reference_takes_the_mean_of_everything() -> None:
    method = built(PRETRAINING.model_copy(update={"pool_masked": False, "pool_cls": True})).eval()
    assert isinstance(method, HFAPretraining)
    batch, text = example([5, 2], [5, 4])
    values, mask = method.video_encoder(method.visual(batch.frames))
    assert values.shape == (2, 4, 16) and mask.tolist() == [[True] * 4, [True, True, False, False]]
    torch.testing.assert_close(method.encode_video(batch.frames)[0][:, 0], values.mean(1))
    sentence = method.text_encoder.module(input_ids=text.input_ids, attention_mask=text.attention_mask)
    torch.testing.assert_close(method.encode_text(text)[0][:, 0], sentence.last_hidden_state.mean(1))


def test_the_frozen_text_encoder_drops_nothing() -> None:
    settings = PRETRAINING.model_copy(update={"language_model": LANGUAGE_MODEL.model_copy(update={"dropout": 0.5})})
    method = built(settings).train()
    assert isinstance(method, HFAPretraining)
    batch, text = example([3, 2], [6, 5])
    sentences = [method.encode_text(text)[0] for _ in range(2)]
    videos = [method.encode_video(batch.frames)[0] for _ in range(2)]
    assert sentences[0].equal(sentences[1]) and not videos[0].equal(videos[1])


def test_the_blank_is_in_the_loss_of_the_reference_only() -> None:
    batch, text = example([5, 2, 3], [5, 4, 4])
    for loss, outputs in (("bce", 5), ("bce_logits", 6)):
        method = built(PRETRAINING.model_copy(update={"loss": loss}))
        assert int(method(batch, text)["pseudo_gloss"].count) == 3 * outputs == int(method.counts(text)["pseudo_gloss"])


# --- exactness -------------------------------------------------------------------------------------------------------


def test_a_clip_of_one_frame_and_alone_equals_together() -> None:
    method = built(PRETRAINING).eval()
    assert isinstance(method, HFAPretraining)
    batch, text = example([1, 6, 3], [5, 4, 6])
    with torch.no_grad():
        together, _ = method.encode_video(batch.frames)
        sentences, _ = method.encode_text(text)
        for row, frames in enumerate(batch.frames.split()):
            alone, mask = method.encode_video(Ragged.from_list([frames]))
            torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)
            assert mask.tolist() == [[True]]
        similarity = method.similarity(together, torch.ones(3, 1), sentences, torch.ones(3, 1))
    assert similarity.shape == (3, 3) and similarity.abs().max() <= 1 + 1e-6


def test_translation_in_a_batch_equals_one_by_one() -> None:
    method = built(TRANSLATION).eval()
    assert isinstance(method, HFATranslation)
    batch, _ = example([6, 1, 4], [3, 3, 3])
    options = {"beams": 3, "length_penalty": 1.0, "max_new_tokens": 6}
    together = method.generate(batch.frames, torch.tensor([36, 36, 36]), **options)
    alone = []
    for frames in batch.frames.split():
        alone += method.generate(Ragged.from_list([frames]), torch.tensor([36]), **options)
    assert together == alone


def test_joint_attention_is_dinov2s() -> None:
    plain = DinoEncoder(VISUAL.frames.model_copy(update={"lora_blocks": 0}))
    torch.manual_seed(3)
    adapted = DinoEncoder(VISUAL.frames.model_copy(update={"lora_blocks": 2})).eval()
    state = plain.state_dict()
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            continue
        if ".qkv.base_layer." in name:
            whole = [state[name.replace("qkv.base_layer", f"{part}_proj")] for part in "qkv"]
            parameter.data.copy_(torch.cat(whole))
        else:
            parameter.data.copy_(state[name.replace(".base_layer", "")])
    batch, _ = example([4, 3], [3, 3])
    with torch.no_grad():
        torch.testing.assert_close(adapted(batch.frames).values, plain.eval()(batch.frames).values)


# --- phases and bad input --------------------------------------------------------------------------------------------


def test_the_first_phase_trains_mapper_and_decoder_only() -> None:
    method, recipe = built(TRANSLATION), load_recipe("hfa_slt_mapper")
    build_optimizer(method, recipe.optim)
    evaluate_frozen(method.train())
    learning = {name for name, p in method.named_parameters() if p.requires_grad}
    assert {name.split(".layers")[0].split(".linear")[0].split(".norm")[0] for name in learning} == {
        "projection",
        "language_model.model.decoder",
    }
    norms = [module for name, module in method.named_modules() if name.startswith("visual") and "norm" in name]
    assert norms and not any(module.training for module in norms)
    assert method.projection.training and method.language_model.model.decoder.training
    before = {name: b.clone() for name, b in method.named_buffers()}
    total(method, method(*example([5, 2], [4, 4]))).backward()
    assert all(b.equal(before[name]) for name, b in method.named_buffers())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="segments have width 16, the language model 32"):
        wide = LANGUAGE_MODEL.model_copy(update={"width": 32})
        build_method(TRANSLATION.model_copy(update={"language_model": wide}), VOCABULARY)
    with pytest.raises(InputError, match="no pseudo-glosses; give a lexicon"):
        build_method(PRETRAINING, Vocabulary(40, 1, 2))
    method = build_method(PRETRAINING, VOCABULARY)
    assert isinstance(method, HFAPretraining)
    with pytest.raises(InputError, match="no lexicon to learn from"):
        method(*example([2, 2], [4, 4]))
    wrong = Lexicon(LEXICON.glosses, {}, np.zeros((5, 300), dtype=np.float32))
    with pytest.raises(InputError, match="width 300, the model 5 of width 8"):
        method.use_lexicon(wrong)
    with pytest.raises(InputError, match="cuts them into patches of 14; set data"):
        DinoEncoder(VISUAL.frames)(Ragged.from_lengths(torch.zeros(1, 48, 32, dtype=torch.uint8), [1]))
    with pytest.raises(InputError, match="lora_blocks is 3"):
        DinoEncoder(VISUAL.frames.model_copy(update={"lora_blocks": 3}))


def test_published_weights_by_folder(tmp_path: Path) -> None:
    from transformers import Dinov2Model

    source = DinoEncoder(VISUAL.frames.model_copy(update={"lora_blocks": 0})).dino
    assert isinstance(source, Dinov2Model)
    source.save_pretrained(tmp_path)
    loaded = DinoEncoder(VISUAL.frames.model_copy(update={"pretrained": str(tmp_path)}))
    assert loaded.width == 16
    block, own = loaded.dino.encoder.layer[1].attention, source.encoder.layer[1].attention
    joint = torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight])
    assert block.qkv.base_layer.weight.equal(joint)
    assert [p.requires_grad for p in loaded.parameters()].count(True) == 8


# --- from stage to stage ---------------------------------------------------------------------------------------------

ADAPTERS = ["--method.lora.rank", "4", "--method.visual.frames.lora.rank", "2"]
SENTENCES = ["heute regnet es", "morgen scheint die sonne", "am abend kommt wind"]


@pytest.mark.parametrize("adapters", [ADAPTERS, []], ids=["adapters", "whole"])
def test_what_goes_from_stage_to_stage(tmp_path: Path, adapters: list[str]) -> None:
    """No key is left over, and what the second stage adds is as it was drawn."""
    tokenizer = build_corpus_tokenizer(SENTENCES, ["de"], 60)

    def vectors(glosses: Sequence[str], _: Sequence[list[str]]) -> np.ndarray:
        return np.ones((len(glosses), 64), dtype=np.float32)

    lexicon = build_lexicon(SENTENCES, tagger("words").analyse, vectors)
    pretraining, mapper, last = (
        load_recipe(name, adapters) for name in ("hfa_pretrain_tiny", "hfa_slt_mapper_tiny", "hfa_slt_tiny")
    )
    first = export.build(pretraining, tokenizer, lexicon)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.rand_like(parameter))
    export.save_export(tmp_path / "pretraining", pretraining, export.tensors(first), tokenizer, lexicon)
    loaded = export.load_export(tmp_path / "pretraining").method
    assert isinstance(loaded, HFAPretraining) and loaded.lexicon is not None
    assert loaded.lexicon.of_sentence == lexicon.of_sentence
    assert all(tensor.equal(export.tensors(first)[name]) for name, tensor in export.tensors(loaded).items())

    fresh, second = (export.build(mapper, tokenizer) for _ in range(2))
    assert mapper.start is not None and last.start is not None
    export.transfer(second, tmp_path / "pretraining", mapper.start.parts, mapper.start.fresh)
    encoder = "language_model.model.encoder."
    for name, tensor in export.tensors(second).items():
        if name.startswith("visual."):
            expected = export.tensors(first)[name]
        elif name.startswith(encoder):
            expected = export.tensors(first)[f"video_encoder.encoder.{name.removeprefix(encoder)}"]
        else:
            expected = export.tensors(fresh)[name]
        assert tensor.equal(expected), name
    new = {name.split(".")[0] for name in export.tensors(second)} - {"visual", "language_model"}
    assert new == {"projection"}

    export.save_export(tmp_path / "mapper", mapper, export.tensors(second), tokenizer)
    third = export.build(last, tokenizer)
    export.transfer(third, tmp_path / "mapper", last.start.parts, last.start.fresh)
    assert all(tensor.equal(export.tensors(second)[name]) for name, tensor in export.tensors(third).items())
