"""GFSLT-VLP and GFSLT: published sizes, groups, masks, what learns from what, and the way between the stages."""

import itertools
import shlex
from pathlib import Path

import pytest
import torch
from transformers import MBartConfig, MBartForConditionalGeneration

from sltscale import cli, config
from sltscale.config import (
    GFSLTSettings,
    GFSLTVLPSettings,
    PackedTemporalSettings,
    PackedVisualSettings,
    ResNetSettings,
    TextDecoderSettings,
    TextEncoderSettings,
    TransformerSettings,
)
from sltscale.data.text import TextTokenizer, build_corpus_tokenizer
from sltscale.errors import InputError
from sltscale.methods import export
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.methods.comparison import group_clips
from sltscale.methods.gfslt import GFSLT
from sltscale.methods.gfslt_vlp import GFSLTVLP
from sltscale.recipe_files import load_recipe, recipe_names
from sltscale.structures import Ragged, TextBatch, VideoBatch

SIZES = {"layers": 1, "width": 24, "heads": 4, "feed_forward": 32, "dropout": 0.0, "max_positions": 32}
BLOCKS = TransformerSettings(**SIZES)
FRAMES = ResNetSettings(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
VISUAL = PackedVisualSettings(frames=FRAMES, temporal=PackedTemporalSettings(width=24), transformer=BLOCKS)
SIGNED = VISUAL.model_copy(update={"temporal": PackedTemporalSettings(width=24, sign_embedding=True)})
DECODER = TextDecoderSettings(**SIZES)
V2 = GFSLTVLPSettings(
    name="gfslt_vlp", visual=VISUAL, text_encoder=TextEncoderSettings(**SIZES), text_decoder=DECODER, group_size=2
)
V1 = V2.model_copy(update={"masked_lm": 0.0})
SLT = GFSLTSettings(name="gfslt", visual=SIGNED, text_decoder=DECODER)
VOCABULARY = Vocabulary(size=40, pad_id=1, eos_id=2)
EVERY = pytest.mark.parametrize("settings", [V1, V2, SLT], ids=["v1", "v2", "slt"])
SENTENCES = ["im tal regnet es heute", "schnee", "die sonne kommt wieder", "wind und wolken"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return build_corpus_tokenizer(SENTENCES, ["de"], 40, max_tokens=32)


def example(clip_lengths: list[int], text_lengths: list[int], extra: int = 0) -> tuple[VideoBatch, TextBatch]:
    frames = torch.randint(0, 256, (sum(clip_lengths), 48, 32), dtype=torch.uint8)
    ids = torch.full((len(text_lengths), max(text_lengths) + extra), VOCABULARY.pad_id)
    masked = ids.clone()
    for row, length in enumerate(text_lengths):
        sentence = [*torch.randint(4, 36, (length - 2,)).tolist(), VOCABULARY.eos_id, 36 + row % 2]
        ids[row, :length] = torch.tensor(sentence)
        masked[row, : length - 1] = torch.tensor([*sentence[: length - 4], 38, *sentence[-2:]])
    names = [str(row) for row in range(len(clip_lengths))]
    batch = VideoBatch(names, Ragged.from_lengths(frames, clip_lengths), names, ["de"] * len(names))
    given = TextBatch(masked, (masked != VOCABULARY.pad_id).long())
    return batch, TextBatch(ids, (ids != VOCABULARY.pad_id).long(), given)


def total(method: Method, batch: VideoBatch, text: TextBatch) -> torch.Tensor:
    losses = method(batch, text)
    assert losses.keys() == method.weights.keys() == method.counts(text).keys()
    for part, loss in losses.items():
        assert int(loss.count) == int(method.counts(text)[part])
    return sum(method.weights[part] * loss.loss_sum / loss.count for part, loss in losses.items())


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "vocabulary", "expected"),
    [
        ("gfslt_vlp_v1", 2172, ["text_encoder 154433536 154433536", "all 213373505 ", "published: 215597633 "]),
        ("gfslt_vlp_v1", 2454, ["all 213662273 213662273", "as published: 216175169 "]),
        ("gfslt_vlp_v2", 2172, ["text_decoder 55892992 55892992", "as published: 215597633 (without text_decoder, "]),
        ("gfslt_vlp_v2", 2454, ["text_decoder 56470528 56470528", "as published: 216175169 (without text_decoder, "]),
        ("gfslt_slt", 2172, ["all 114835008 114835008"]),
        ("gfslt_baseline", 2454, ["all 115412544 115412544"]),
    ],
)
def test_published_sizes(recipe: str, vocabulary: int, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", recipe, "--parameters", "--vocabulary", str(vocabulary)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(part in shown for part in expected), shown


def test_show_takes_overrides_and_the_recipes_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    frozen_head = ["--method.visual.transformer.layers", "2", "--text.vocabulary", "2454"]
    assert cli.main(["show", "gfslt_slt", "--parameters", *frozen_head]) == 0
    layer = 4 * 1024 * 1025 + 2 * 1024 * 4096 + 4096 + 1024 + 2 * 2 * 1024
    assert f"{115_412_544 - layer}" in capsys.readouterr().out
    assert cli.main(["show", "gfslt_sl", "--parameters"]) == 2
    assert "did you mean gfslt_slt" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["show", "gfslt_slt", "--parameters", "--vocabulary", "0"])
    assert "expected a number of at least 1, found '0'" in capsys.readouterr().err


def test_every_ablation_is_an_override() -> None:
    """The documented ones, each of which changes the recipe."""
    text = (Path(__file__).parents[2] / "docs/methods.md").read_text(encoding="utf-8")
    table = text.split("## GFSLT-VLP\n")[1].split("\n## ")[0].splitlines()
    found = [cells for line in table if "`--" in line and len(cells := line.split("|")) == 5]
    assert len(found) >= 12
    for _, _, recipe, options, _ in found:
        name = recipe.strip(" `")
        assert load_recipe(name, shlex.split(options.strip(" `"))) != load_recipe(name), options


# --- what learns from what -------------------------------------------------------------------------------------------


@EVERY
def test_every_parameter_learns(settings: GFSLTVLPSettings | GFSLTSettings) -> None:
    method = build_method(settings, VOCABULARY)
    total(method, *example([5, 1, 9, 3], [7, 5, 5, 6])).backward()
    for name, parameter in method.named_parameters():
        assert parameter.dim() > 0, name
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_nothing_but_the_decoder_learns_from_masked_sentences() -> None:
    method = build_method(V2, VOCABULARY)
    method.weights["contrastive"] = 0.0
    batch, text = example([5, 1, 9, 3], [7, 5, 5, 6])
    total(method, batch, text).backward()
    learning = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"text_decoder"}
    assert text.masked is not None
    others = TextBatch(text.masked.input_ids.clamp(max=37), text.masked.attention_mask)
    plain = method(batch, TextBatch(text.input_ids, text.attention_mask, others))
    assert not torch.equal(plain["masked_lm"].loss_sum, method(batch, text)["masked_lm"].loss_sum)
    assert torch.equal(plain["contrastive"].loss_sum, method(batch, text)["contrastive"].loss_sum)


@EVERY
@pytest.mark.parametrize("kind", ["text", "video"])
def test_extra_padding_changes_nothing(settings: GFSLTVLPSettings | GFSLTSettings, kind: str) -> None:
    """Not the losses, not one gradient, not the batch norms' statistics."""
    method = build_method(settings, VOCABULARY).double()
    start = {name: tensor.clone() for name, tensor in export.tensors(method).items()}
    results = []
    for extra in (0, 5):
        with torch.no_grad():
            for name, tensor in export.tensors(method).items():
                tensor.copy_(start[name])
        torch.manual_seed(1)
        method.zero_grad()
        batch, text = example([5, 1, 9, 3], [7, 5, 5, 6], extra if kind == "text" else 0)
        longest = 9 + (extra if kind == "video" else 0)
        frames = Ragged(batch.frames.values, batch.frames.cu_seqlens, longest)
        loss = total(method, VideoBatch(batch.ids, frames, batch.texts, batch.languages), text)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
        buffers = {f"buffer {name}": value.clone() for name, value in export.persistent_buffers(method).items()}
        results.append({"loss": loss.detach(), **gradients, **buffers})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_clips_shorter_than_the_kernel(length: int) -> None:
    method = build_method(SLT, VOCABULARY).eval()
    assert isinstance(method, GFSLT)
    clip = torch.randint(0, 256, (length, 48, 32), dtype=torch.uint8)
    tokens = method.visual(Ragged.from_list([clip]))
    assert tokens.lengths.tolist() == [-(-length // 4) + 1]
    repeated = Ragged.from_list([torch.cat([clip, clip[-1:].expand(-length % 4, -1, -1)])])
    torch.testing.assert_close(method.visual(repeated).values, tokens.values)  # the last frame fills the last four
    options = {"beams": 2, "length_penalty": 1.0, "max_new_tokens": 4}
    assert len(method.generate(Ragged.from_list([clip]), torch.tensor([36]), **options)) == 1
    method.train()
    assert torch.isfinite(total(method, *example([length], [5])))


def test_frames_encoded_with_their_copies_come_out_the_same_in_evaluation() -> None:
    method = build_method(SLT, VOCABULARY).eval()
    assert isinstance(method, GFSLT)
    batch, _ = example([5, 1, 9], [4, 4, 4])
    expected = method.visual(batch.frames)
    method.visual.edge_copies = "frames"
    found = method.visual(batch.frames)
    assert found.lengths.tolist() == expected.lengths.tolist() == [3, 2, 4]
    torch.testing.assert_close(found.values, expected.values)
    method.train()
    before = method.visual.frames.resnet.embedder.embedder.normalization.running_mean.clone()
    means = []
    for copies in ("features", "frames"):
        method.visual.frames.resnet.embedder.embedder.normalization.running_mean.copy_(before)
        method.visual.edge_copies = copies
        method.visual(batch.frames)
        means.append(method.visual.frames.resnet.embedder.embedder.normalization.running_mean.clone())
    assert not torch.allclose(*means)  # training counts the copies, as GFSLT-VLP's code


def test_the_sentence_is_read_at_its_last_token() -> None:
    method = build_method(V1, VOCABULARY).eval()
    assert isinstance(method, GFSLTVLP)
    _, text = example([1, 1], [7, 5])
    hidden = method.text_encoder(text.input_ids, text.attention_mask)
    vectors, mask = method.encode_text(text)
    assert vectors.shape == (2, 1, 24) and mask.all()
    torch.testing.assert_close(vectors[:, 0], torch.stack([hidden[0, 6], hidden[1, 4]]))


def test_similarity_is_what_training_compares() -> None:
    method = build_method(V1.model_copy(update={"group_size": None}), VOCABULARY).eval()
    assert isinstance(method, GFSLTVLP)
    batch, text = example([5, 1, 9], [7, 5, 5])
    with torch.no_grad():
        similarity = method.similarity(*method.encode_video(batch.frames), *method.encode_text(text))
        loss = method(batch, text)["contrastive"]
    target = torch.softmax(10 * torch.eye(3), 1)
    terms = [(target * (target.log() - logits.log_softmax(1))).sum() for logits in (similarity, similarity.T)]
    torch.testing.assert_close(loss.loss_sum, (terms[0] + terms[1]) / 2)
    assert float(similarity.abs().max()) > 1.5  # scaled by exp(theta), without a ceiling:
    with torch.no_grad():
        method.logit_scale.theta.fill_(9.0)
    assert method.logit_scale().item() == pytest.approx(8103.08, rel=1e-4)


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 16, 18])
def test_groups_hold_at_least_their_size_and_follow_the_clips(count: int) -> None:
    keys = torch.randint(-(2**62), 2**62, (count,))
    groups = group_clips(keys, 4)
    sizes = groups.bincount()
    assert len(sizes) == max(1, count // 4) and sizes.max() - sizes.min() <= 1 and sizes.sum() == count
    order = torch.randperm(count)
    assert group_clips(keys[order], 4).equal(groups[order])  # however the ranks bring them


def test_any_two_clips_meet_equally_often() -> None:
    """Of 8 clips in groups of 4 two meet with probability 3 / 7; the same two in the company of 1500 sets of others."""
    pair = torch.tensor([5, 2**61])
    met = 0
    for _ in range(1500):
        groups = group_clips(torch.cat([pair, torch.randint(-(2**62), 2**62, (6,))]), 4)
        met += int(groups[0] == groups[1])
    assert met / 1500 == pytest.approx(3 / 7, abs=0.05)


# --- sentences that are masked ---------------------------------------------------------------------------------------


def unpadded(text: TextBatch) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(text.input_ids, text.attention_mask.sum(1), strict=True)]


def test_masks_depend_on_run_step_and_clip_only(tokenizer: TextTokenizer) -> None:
    method = build_method(V2.model_copy(update={"noise": "omit", "noise_rate": 0.5}), VOCABULARY)
    frames = Ragged.from_lengths(torch.zeros(4, 48, 32, dtype=torch.uint8), [1, 1, 1, 1])
    batch = VideoBatch(["a", "b", "c", "d"], frames, SENTENCES, ["de"] * 4)
    whole = method.tokenise(tokenizer.encode, batch, (1, 7))
    assert whole.masked is not None
    assert whole.input_ids.equal(tokenizer.encode(SENTENCES, ["de"] * 4).input_ids)
    mask = tokenizer.backend.convert_tokens_to_ids("<mask>")
    assert ((whole.masked.input_ids == mask).sum(1) == torch.tensor([3, 1, 2, 2])).all()
    parts = [method.tokenise(tokenizer.encode, part, (1, 7)).masked for part in batch.split([3, 1])]
    assert [row for part in parts for row in unpadded(part)] == unpadded(whole.masked)
    same = VideoBatch(batch.ids, frames, SENTENCES[:1] * 4, ["de"] * 4)
    drawn = unpadded(method.tokenise(tokenizer.encode, same, (1, 7)).masked)
    assert len({tuple(row) for row in drawn}) > 1  # each clip has its own
    others = [method.tokenise(tokenizer.encode, batch, seed).masked for seed in ((1, 8), (2, 7))]
    assert all(unpadded(other) != unpadded(whole.masked) for other in others)
    assert build_method(V1, VOCABULARY).tokenise(tokenizer.encode, batch, (1, 7)).masked is None


# --- from pretraining to translation ---------------------------------------------------------------------------------

ENCODER = "visual.transformer.blocks -> language_model.model.encoder"
DECODER_PART = "text_decoder.blocks -> language_model.model.decoder"


def recipe(method: GFSLTVLPSettings | GFSLTSettings) -> config.Recipe:
    base = load_recipe("gfslt_slt_tiny")
    return base.model_copy(update={"method": method, "start": None, "text": config.TextSettings(max_tokens=32)})


def state(method: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in export.tensors(method).items()}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("slt", ["gfslt_slt", "gfslt_slt_csl_daily", "gfslt_slt_tiny"])
def test_what_translation_takes_over(version: int, slt: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """No tensor of the parts is left over, and of the model exactly those are not taken that GFSLT-VLP's code reports
    as missing or overwrites: embedding, positions, output layer and bias, sign embedding (v1: the whole decoder)."""
    start = load_recipe(slt).start
    assert start is not None and start.fresh[0] == "visual.temporal.sign_embedding"
    pretrained = export.build(recipe(V2 if version == 2 else V1), tokenizer)
    with torch.no_grad():
        for tensor in state(pretrained).values():
            assert tensor.numel() > 0
        for tensor in export.tensors(pretrained).values():
            tensor.copy_(torch.rand(tensor.shape).to(tensor.dtype) + 2)
    export.save_export(tmp_path, recipe(V1), state(pretrained), tokenizer)
    method = export.build(recipe(SLT), tokenizer)
    before = state(method)
    export.transfer(method, tmp_path, (*start.parts, *([DECODER_PART] if version == 2 else [])), start.fresh)
    after = state(method)

    decoder = "language_model.model.decoder."
    missing = {name for name in after if after[name].equal(before[name])}
    expected = {f"language_model.{x}" for x in ("model.shared.weight", "lm_head.weight", "final_logits_bias")}
    expected |= {name for name in after if ".sign_embedding." in name}
    expected |= {name for name in after if name.startswith(decoder) and (version == 1 or ".embed_positions." in name)}
    assert missing == expected
    source = export.tensors(pretrained)
    renamed = (("language_model.model.encoder.", "visual.transformer.blocks."), (decoder, "text_decoder.blocks."))
    for name in after.keys() - missing:
        theirs = name
        for ours, their in renamed:
            theirs = theirs.replace(ours, their)
        assert after[name].equal(source[theirs]), name
    left = {name.split(".")[0] for name in source} - {"visual", "text_decoder"}
    assert left == {"text_encoder", "video_head", "logit_scale"}


def test_parts_and_fresh_names_that_are_not_there(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    pretrained = export.build(recipe(V1), tokenizer)
    export.save_export(tmp_path, recipe(V1), state(pretrained), tokenizer)
    method = export.build(recipe(SLT), tokenizer)
    for parts, fresh, message in (
        ((DECODER_PART,), (), "holds no part text_decoder.blocks; it holds"),
        (("visual.frames -> encoder",), (), "the model has no part encoder; it has"),
        ((ENCODER,), ("visual.sign",), "start.fresh: the model holds nothing called visual.sign"),
        (("visual.temporal",), (), "weights do not fit the model: missing sign_embedding"),
        (("visual.frames -> visual.temporal",), (), "weights do not fit the model: "),
    ):
        with pytest.raises(InputError, match=message):
            export.transfer(method, tmp_path, parts, fresh)


# --- mBART's weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def mbart(tmp_path: Path) -> tuple[MBartForConditionalGeneration, str]:
    model = MBartForConditionalGeneration(
        MBartConfig(
            vocab_size=40,
            d_model=24,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=32,
            init_std=0.5,
            scale_embedding=True,
        )
    )
    model.save_pretrained(tmp_path / "mbart")
    return model, str(tmp_path / "mbart")


def test_a_pretrained_mbart(mbart: tuple[MBartForConditionalGeneration, str]) -> None:
    theirs, folder = mbart[0].state_dict(), mbart[1]
    embedding, positions = theirs["model.shared.weight"], theirs["model.decoder.embed_positions.weight"]
    decoder = DECODER.model_copy(update={"pretrained": folder})
    towers = {"text_encoder": TextEncoderSettings(pretrained=folder), "text_decoder": decoder}
    v2 = build_method(V2.model_copy(update=towers), VOCABULARY)
    assert isinstance(v2, GFSLTVLP)
    for name, tensor in v2.text_encoder.blocks.state_dict().items():
        assert tensor.equal(theirs[f"model.encoder.{name}"]), name
    assert v2.text_encoder.blocks.config.dropout == 0.3
    assert v2.text_decoder.blocks.embed_tokens.weight.equal(embedding)
    assert v2.text_decoder.blocks.embed_positions.weight.equal(positions)
    assert v2.text_decoder.lm_head.weight.equal(embedding)
    separate = {p.data_ptr() for p in (v2.text_decoder.lm_head.weight, v2.text_decoder.blocks.embed_tokens.weight)}
    assert len(separate) == 2

    light = build_method(SLT.model_copy(update={"text_decoder": decoder}), VOCABULARY)
    assert isinstance(light, GFSLT)
    assert light.language_model.model.shared.weight.equal(embedding)
    assert light.language_model.get_decoder().embed_positions.weight.equal(positions)
    assert not light.language_model.lm_head.weight.equal(embedding)  # freshly drawn, not tied
    assert len(light.language_model.get_decoder().layers) == 1
    tied = build_method(SLT.model_copy(update={"text_decoder": decoder.model_copy(update={"tied": True})}), VOCABULARY)
    assert tied.language_model.lm_head.weight is tied.language_model.model.shared.weight

    whole = decoder.model_copy(update={"start": "decoder", "dropout": 0.4})
    large = build_method(SLT.model_copy(update={"text_decoder": whole}), VOCABULARY)
    for name, tensor in large.language_model.get_decoder().state_dict().items():
        assert tensor.equal(theirs[f"model.decoder.{name}"]), name
    assert large.language_model.get_decoder().dropout == 0.4 and large.language_model.get_encoder().dropout == 0.0
    assert len(large.language_model.get_encoder().layers) == 1


def test_what_does_not_fit_is_refused(mbart: tuple[MBartForConditionalGeneration, str]) -> None:
    folder = mbart[1]
    wide = DECODER.model_copy(update={"width": 48})
    wide_visual = SIGNED.model_copy(update={"temporal": PackedTemporalSettings(width=48)})
    taken = DECODER.model_copy(update={"pretrained": folder})
    longer = taken.model_copy(update={"max_positions": 64})
    for settings, changed, vocabulary, message in (
        (SLT, {"visual": wide_visual}, 40, "temporal.width is 48, method.visual.transformer.width 24"),
        (SLT, {"text_decoder": wide}, 40, "text_decoder's width is 48"),
        (V2, {"text_decoder": wide}, 40, "text_decoder.width is 48"),
        (SLT, {"text_decoder": taken}, 41, "has 40 token ids, padding 1 and end 2; the tokenizer has 41"),
        (SLT, {"text_decoder": longer}, 40, "embed_positions of .* is .34, 24., wanted is .66, 24."),
    ):
        with pytest.raises(InputError, match=message):
            build_method(settings.model_copy(update=changed), Vocabulary(vocabulary, 1, 2))


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_are_whole_and_lengths_fit() -> None:
    systems = ("gfslt_baseline", "gfslt_vlp_v1", "gfslt_vlp_v2", "gfslt_slt")
    assert {f"{a}{b}" for a, b in itertools.product(systems, ("", "_csl_daily", "_tiny"))} <= set(recipe_names())
    v2, slt = load_recipe("gfslt_vlp_v2"), load_recipe("gfslt_slt")
    assert isinstance(v2.method, GFSLTVLPSettings) and isinstance(slt.method, GFSLTSettings)
    assert (v2.method.group_size, v2.method.targets, v2.method.masked_lm) == (4, "softmax10", 1.0)
    group = v2.optim.groups[0]
    assert (group.part, group.name, group.lr, group.period) == ("text_decoder", "adamw", 1e-3, 5)
    assert group.betas == (0.9, 0.98) and group.weight_decay == 0.0
    assert slt.method.visual.temporal.sign_embedding and not v2.method.visual.temporal.sign_embedding
    assert (slt.optim.name, slt.optim.lr, slt.optim.weight_decay, slt.train.epochs) == ("sgd", 0.01, 0.001, 200)
    with pytest.raises(InputError, match=r"data.max_frames / 4 \+ 2 is 1027, more than .*max_positions 1024"):
        load_recipe("gfslt_vlp_v1", ["--data.max_frames", "4100"])
    with pytest.raises(InputError, match=r"evaluation.max_new_tokens \+ 1 is 2001, more than method.text_decoder"):
        load_recipe("gfslt_slt", ["--evaluation.max_new_tokens", "2000"])


def test_translate_in_a_batch_equals_one_by_one() -> None:
    method = build_method(SLT, VOCABULARY)
    assert isinstance(method, GFSLT)
    batch, text = example([6, 1, 4], [7, 5, 5])
    for _ in range(5):
        method(batch, text)
    method.eval()
    for parameter in method.language_model.parameters():
        parameter.data.mul_(4)
    languages = torch.tensor([36, 37, 36])
    options = {"beams": 3, "length_penalty": 1.0, "max_new_tokens": 8}
    together = method.generate(batch.frames, languages, **options)
    alone = []
    for row, frames in enumerate(batch.frames.split()):
        alone += method.generate(Ragged.from_list([frames]), languages[row : row + 1], **options)
    assert together == alone and any(together)
