"""The methods' contract: sums and counts, every parameter trained, padding without effect, published sizes."""

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from sltscale.config import (
    C2RLSettings,
    LanguageModelSettings,
    MethodSettings,
    ResNetSettings,
    RetrievalSettings,
    SentenceEncoderSettings,
    TextEncoderSettings,
    TransformerSettings,
    TranslationSettings,
    VisualSettings,
)
from sltscale.errors import InputError
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.methods.c2rl import C2RL
from sltscale.methods.comparison import group_clips, keys_of
from sltscale.methods.translation import Translation
from sltscale.structures import LossOutput, Ragged, TextBatch, VideoBatch

BLOCKS = TransformerSettings(layers=1, width=24, heads=4, feed_forward=32, dropout=0.0, max_positions=32)
VISUAL = VisualSettings(
    frames=ResNetSettings(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1)), transformer=BLOCKS
)
SENTENCES = SentenceEncoderSettings(**BLOCKS.model_dump())
PRETRAINING = C2RLSettings(name="c2rl", visual=VISUAL, text_encoder=SENTENCES, text_decoder=BLOCKS)
TRANSLATION = TranslationSettings(
    name="translation",
    visual=VISUAL,
    language_model=LanguageModelSettings(
        width=32, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=48, dropout=0.0, attention_dropout=0.0
    ),
)
RETRIEVAL = RetrievalSettings(
    name="retrieval",
    visual=VISUAL,
    encoder=TextEncoderSettings(layers=1, width=32, heads=4, feed_forward=48, dropout=0.0, max_positions=32),
)
VOCABULARY = Vocabulary(size=40, pad_id=1, eos_id=2)
CASES = {
    "c2rl": PRETRAINING,
    "c2rl, one embedding": PRETRAINING.model_copy(update={"share_embeddings": True, "tied": True}),
    "c2rl, wide": PRETRAINING.model_copy(
        update={"text_encoder": SENTENCES.model_copy(update={"width": 32}), "special_tokens": False}
    ),
    "translation": TRANSLATION,
    "translation, source tokens": TRANSLATION.model_copy(update={"source_tokens": True}),
    "retrieval": RETRIEVAL,
}
EACH = pytest.mark.parametrize("settings", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def example(clip_lengths: list[int], text_lengths: list[int], extra: int = 0) -> tuple[VideoBatch, TextBatch]:
    frames = torch.randint(0, 256, (sum(clip_lengths), 48, 32), dtype=torch.uint8)
    ids = torch.full((len(text_lengths), max(text_lengths) + extra), VOCABULARY.pad_id)
    for row, length in enumerate(text_lengths):
        sentence = [*torch.randint(4, 36, (length - 2,)).tolist(), VOCABULARY.eos_id, 36 + row % 2]
        ids[row, :length] = torch.tensor(sentence)
    names = [str(row) for row in range(len(clip_lengths))]
    batch = VideoBatch(names, Ragged.from_lengths(frames, clip_lengths), names, ["de"] * len(names))
    return batch, TextBatch(ids, (ids != VOCABULARY.pad_id).long())


def total(method: Method, losses: dict[str, LossOutput]) -> torch.Tensor:
    return sum(method.weights[part] * loss.loss_sum / loss.count for part, loss in losses.items())


@EACH
@pytest.mark.parametrize("seed", [0, 1])
def test_contract(settings: MethodSettings, seed: int) -> None:
    torch.manual_seed(seed)
    method = build_method(settings, VOCABULARY)
    losses = method(*example([5, 1, 9, 3], [7, 3, 5, 4]))
    assert losses.keys() == method.weights.keys()
    for loss in losses.values():
        assert loss.loss_sum.dim() == 0 and loss.count.dim() == 0
        assert all(value.dim() == 0 and not value.requires_grad for value in loss.metrics.values())
    counts = method.counts(example([5, 1, 9, 3], [7, 3, 5, 4])[1])
    assert {part: int(loss.count) for part, loss in losses.items()} == {p: int(count) for p, count in counts.items()}
    if "lm" in losses:
        assert int(losses["lm"].count) == 7 + 3 + 5 + 4  # </s> and the language code are learnt too
    total(method, losses).backward()
    for name, parameter in method.named_parameters():
        assert parameter.dim() > 0, name
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@EACH
def test_loss_at_the_start(settings: MethodSettings) -> None:
    """ln(N) per direction where similarities carry nothing yet, ln(V) per token."""
    method = build_method(settings, VOCABULARY)
    with torch.no_grad():
        losses = {part: loss.loss_sum / loss.count for part, loss in method(*example([4] * 8, [6] * 8)).items()}
    if "lm" in losses:
        assert float(losses["lm"]) == pytest.approx(math.log(40), abs=0.3)
    if "contrastive" in losses:
        assert float(losses["contrastive"]) == pytest.approx(2 * math.log(8), abs=1.0)


@EACH
def test_extra_text_padding_changes_nothing(settings: MethodSettings) -> None:
    method = build_method(settings, VOCABULARY).double()
    results = []
    for extra in (0, 5):
        torch.manual_seed(1)
        method.zero_grad()
        losses = method(*example([5, 1, 9, 3], [7, 3, 5, 4], extra))
        total(method, losses).backward()
        gradients = {name: p.grad.clone() for name, p in method.named_parameters()}
        results.append({**{part: loss.loss_sum for part, loss in losses.items()}, **gradients})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@EACH
def test_extra_video_padding_changes_nothing(settings: MethodSettings) -> None:
    """max_seqlen larger than the longest clip is what padding to a longer batch amounts to."""
    method = build_method(settings, VOCABULARY).double()
    batch, text = example([5, 1, 9, 3], [7, 3, 5, 4])
    results = []
    for longest in (9, 14):
        method.zero_grad()
        frames = Ragged(batch.frames.values, batch.frames.cu_seqlens, longest)
        losses = method(VideoBatch(batch.ids, frames, batch.texts, batch.languages), text)
        total(method, losses).backward()
        gradients = {name: p.grad.clone() for name, p in method.named_parameters()}
        results.append({**{part: loss.loss_sum for part, loss in losses.items()}, **gradients})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@EACH
def test_two_equal_seeds_train_equally_and_the_loss_falls(settings: MethodSettings) -> None:
    batch, text = example([5, 2, 6, 3], [7, 3, 5, 4])
    curves = []
    for _ in range(2):
        torch.manual_seed(3)
        method = build_method(settings, VOCABULARY)
        optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
        curve = []
        for _ in range(20):
            loss = total(method, method(batch, text))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == curves[1]
    assert curves[0][-1] < 0.75 * curves[0][0]


def test_a_weight_of_zero_builds_no_tower() -> None:
    batch, text = example([3, 2], [4, 4])
    only_lm = build_method(PRETRAINING.model_copy(update={"alpha": 0.0}), VOCABULARY)
    assert {name for name, _ in only_lm.named_children()} == {"visual", "text_decoder"}
    assert only_lm(batch, text).keys() == only_lm.weights.keys() == {"lm"}
    with pytest.raises(InputError, match="alpha > 0"):
        only_lm.encode_text(text)
    only_contrastive = build_method(PRETRAINING.model_copy(update={"beta": 0.0}), VOCABULARY)
    assert {name for name, _ in only_contrastive.named_children()} == {"visual", "text_encoder", "logit_scale"}
    assert only_contrastive(batch, text).keys() == {"contrastive"}
    with pytest.raises(InputError, match="both 0"):
        build_method(PRETRAINING.model_copy(update={"alpha": 0.0, "beta": 0.0}), VOCABULARY)


def test_what_cannot_be_coupled_is_refused() -> None:
    for changes, message in (
        ({"text_decoder": BLOCKS.model_copy(update={"width": 32})}, "method.text_decoder.width is 32"),
        ({"text_encoder": CASES["c2rl, wide"].text_encoder, "share_embeddings": True}, "encoder's width is 32"),
        ({"alpha": 0.0, "share_embeddings": True}, "with alpha 0 there is no text encoder to share with"),
    ):
        with pytest.raises(InputError, match=message):
            build_method(PRETRAINING.model_copy(update=changes), VOCABULARY)
    with pytest.raises(ValidationError, match="source_tokens are mBART's, not of a language model mt5"):
        TranslationSettings(name="translation", language_model={"architecture": "mt5"}, source_tokens=True)


def test_one_embedding() -> None:
    method = build_method(CASES["c2rl, one embedding"], VOCABULARY)
    embedding = method.get_submodule("text_encoder.blocks.embed_tokens").weight
    assert method.get_submodule("text_decoder.blocks.embed_tokens").weight is embedding
    assert method.get_submodule("text_decoder.lm_head").weight is embedding


def test_sentences_are_compared_without_special_tokens() -> None:
    _, text = example([5, 1, 9, 3], [7, 3, 5, 4])
    method = build_method(CASES["c2rl, wide"], VOCABULARY).double()
    hidden, mask = method.encode_text(text)
    assert mask.sum(1).tolist() == [5, 1, 3, 2]
    whole = build_method(PRETRAINING, VOCABULARY).encode_text(text)[1]
    assert whole.sum(1).tolist() == [7, 3, 5, 4]
    read = method.text_encoder(text.input_ids, text.attention_mask)  # which all tokens are read for
    torch.testing.assert_close(hidden, read @ method.text_projection.weight.T + method.text_projection.bias)


def test_clips_are_compared_in_groups() -> None:
    """Each group by itself, as a batch of its own."""
    settings = PRETRAINING.model_copy(update={"beta": 0.0, "group_size": 3})
    method = build_method(settings, VOCABULARY).eval().double()
    batch, text = example([5, 1, 9, 3, 4, 2, 6], [7, 3, 5, 4, 6, 5, 3])
    groups = group_clips(keys_of(batch.ids, torch.device("cpu")), 3)
    assert sorted(groups.bincount().tolist()) == [3, 4]
    found = method(batch, text)["contrastive"]
    alone = build_method(PRETRAINING.model_copy(update={"beta": 0.0}), VOCABULARY).eval().double()
    alone.load_state_dict(method.state_dict())
    losses = []
    for group in range(2):
        rows = (groups == group).nonzero()[:, 0].tolist()
        part = VideoBatch(
            [batch.ids[row] for row in rows],
            Ragged.from_list([batch.frames.split()[row] for row in rows]),
            [batch.texts[row] for row in rows],
            [batch.languages[row] for row in rows],
        )
        losses.append(alone(part, TextBatch(text.input_ids[rows], text.attention_mask[rows]))["contrastive"].loss_sum)
    torch.testing.assert_close(found.loss_sum, sum(losses))
    assert not torch.isclose(found.loss_sum, alone(batch, text)["contrastive"].loss_sum)


@pytest.mark.parametrize("settings", [PRETRAINING, RETRIEVAL], ids=["c2rl", "retrieval"])
def test_equal_sentences_are_partners_when_asked_for(settings: MethodSettings) -> None:
    """With all sentences equal no candidate is wrong, and accuracy is 1; of another language they are not equal."""
    method = build_method(settings.model_copy(update={"duplicates": "positives"}), VOCABULARY).eval()
    batch, text = example([5, 1, 9, 3], [7, 3, 5, 4])

    def accuracy(method: Method, texts: list[str], languages: list[str]) -> float:
        changed = dataclasses.replace(batch, texts=texts, languages=languages)
        return float(method(changed, text)["contrastive"].metrics["v2t_accuracy"])

    negatives = build_method(settings, VOCABULARY).eval()
    negatives.load_state_dict(method.state_dict())
    german = ["de"] * 4
    assert accuracy(method, ["same"] * 4, german) == 1
    assert accuracy(negatives, ["same"] * 4, german) < 1
    assert accuracy(method, ["same"] * 4, ["de", "en", "zh", "fr"]) == accuracy(negatives, ["same"] * 4, german)


def test_source_tokens_stand_behind_each_clip() -> None:
    """As if each were read alone, </s> and language code at its end."""
    method = build_method(CASES["translation, source tokens"], VOCABULARY).eval()
    batch, text = example([6, 1, 4], [7, 3, 5])
    logits = method.logits(batch.frames, text)
    codes = [36, 37, 36]
    for row, (frames, words) in enumerate(zip(batch.frames.split(), [7, 3, 5], strict=True)):
        video = method.projection(method.visual(Ragged.from_list([frames])).values)[None]
        ends = method.language_model.get_input_embeddings()(torch.tensor([[VOCABULARY.eos_id, codes[row]]]))
        sentence = text.input_ids[row : row + 1, :words]
        expected = method.language_model(
            inputs_embeds=torch.cat([video, ends], 1), decoder_input_ids=sentence.roll(1, 1), use_cache=False
        ).logits
        torch.testing.assert_close(logits[row, :words], expected[0], rtol=0, atol=1e-5)


def test_pretraining_and_translation_share_the_visual_encoder() -> None:
    pretrained, translation = build_method(PRETRAINING, VOCABULARY), build_method(TRANSLATION, VOCABULARY)
    translation.get_submodule("visual").load_state_dict(pretrained.get_submodule("visual").state_dict())
    assert {name for name, _ in translation.named_children()} == {"visual", "projection", "language_model"}


def test_similarity_in_chunks_equals_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build_method(PRETRAINING, VOCABULARY).eval()
    assert isinstance(method, C2RL)
    batch, text = example([5, 1, 4, 3, 2], [7, 3, 5, 4, 6])
    with torch.no_grad():
        video, video_mask = method.encode_video(batch.frames)
        sentence, sentence_mask = method.encode_text(text)
        assert video.shape == (5, 5, 24) and video_mask.sum(1).tolist() == [5, 1, 4, 3, 2]
        assert sentence.shape == (5, 7, 24) and sentence_mask.dtype == torch.bool
        whole = method.similarity(video, video_mask, sentence[:3], sentence_mask[:3])
        assert whole.shape == (5, 3)
        monkeypatch.setattr("sltscale.methods.token_contrast.SIMILARITY_ELEMENTS", 2 * 5 * 3 * 7)
        chunked = method.similarity(video, video_mask, sentence[:3], sentence_mask[:3])
        torch.testing.assert_close(chunked, whole)
        one = method.similarity(video[3:4, :3], video_mask[3:4, :3], sentence[1:2, :3], sentence_mask[1:2, :3])
    torch.testing.assert_close(one[0, 0], whole[3, 1])


@pytest.mark.parametrize("case", ["translation", "translation, source tokens"])
def test_translate_in_a_batch_equals_one_by_one(case: str) -> None:
    method = build_method(CASES[case], VOCABULARY)
    assert isinstance(method, Translation)
    batch, text = example([6, 1, 4], [7, 3, 5])
    for _ in range(30):
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
    assert together == alone


def test_c2rls_published_sizes() -> None:
    """V = 2454 token ids, D = 512, F = 2048, 3 layers each, ResNet-18.

    attention: 4 D(D+1) = 1,050,624. feed-forward: 2 D F + F + D = 2,099,712. layer norm: 2 D = 1,024.
    encoder layer: attention + feed-forward + 2 norms = 3,152,384; decoder layer: 2 attentions, 3 norms = 4,204,032.
    around the layers: positions (1024 + 2) D = 525,312 and 2 norms = 527,360. token table: V D = 1,256,448.
    ResNet-18 without classifier 11,176,512; convolution 3 D D + norm 2 D = 787,456; linear D(D+1) = 262,656.
    """
    with torch.device("meta"):
        method = build_method(C2RLSettings(name="c2rl"), Vocabulary(2454, 1, 2))
    blocks = 3 * 3_152_384 + 527_360
    expected = {
        "visual": 11_176_512 + 787_456 + 262_656 + blocks,
        "text_encoder": 1_256_448 + blocks,
        "text_decoder": 2 * 1_256_448 + 3 * 4_204_032 + 527_360,
        "logit_scale": 1,
    }
    found = {name: sum(p.numel() for p in child.parameters()) for name, child in method.named_children()}
    assert found == expected
    assert sum(expected.values()) == 49_104_449
