"""Shapes, lengths and padding of the model parts; loading of published layouts."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.video.frame import VideoFrame
from torch import Tensor, nn
from transformers import (
    MBartConfig,
    MBartForConditionalGeneration,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from sltscale.config import LanguageModelSettings, ResNetSettings, TransformerSettings, VisualSettings
from sltscale.errors import InputError
from sltscale.models.decoding import beam_search
from sltscale.models.frames import IMAGENET_MEAN, IMAGENET_STD, FrameEncoder, yuv_to_rgb
from sltscale.models.language import (
    TextDecoder,
    TextEncoder,
    TransformerEncoder,
    Vocabulary,
)
from sltscale.models.layers import GlobalBatchNorm
from sltscale.models.mbart import MBartCoupling, build_mbart, teacher_forcing
from sltscale.models.temporal import TemporalConvolution
from sltscale.models.translator import Translator
from sltscale.models.visual import VisualEncoder
from sltscale.structures import Ragged, TextBatch

FRAMES = ResNetSettings(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
BLOCKS = TransformerSettings(layers=2, width=24, heads=4, feed_forward=32, dropout=0.0, max_positions=32)
VISUAL = VisualSettings(frames=FRAMES, transformer=BLOCKS)
LANGUAGE = LanguageModelSettings(
    width=32, encoder_layers=1, decoder_layers=1, heads=4, feed_forward=48, dropout=0.0, attention_dropout=0.0
)
VOCABULARY = Vocabulary(size=40, pad_id=1, eos_id=2)
COUPLING = MBartCoupling(VOCABULARY)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def clips(lengths: list[int], size: int = 32) -> Ragged:
    return Ragged.from_lengths(torch.randint(0, 256, (sum(lengths), size * 3 // 2, size), dtype=torch.uint8), lengths)


def settle(module: torch.nn.Module, *inputs: object) -> torch.nn.Module:
    """Eval mode, with running statistics that fit the inputs."""
    for _ in range(30):
        module(*inputs)
    return module.eval()


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_frame_encoder_shape_and_norms(layer_type: str) -> None:
    encoder = FrameEncoder(FRAMES.model_copy(update={"layer_type": layer_type}))
    frames = clips([3, 1, 4])
    features = encoder(frames)
    assert features.values.shape == (8, encoder.width) == (8, 16)
    assert features.cu_seqlens is frames.cu_seqlens
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, GlobalBatchNorm) for m in norms)
    with pytest.raises(TypeError, match="uint8"):
        encoder(frames.with_values(frames.values.float()))


def test_frame_encoder_normalises_by_imagenet() -> None:
    encoder = settle(FrameEncoder(FRAMES), clips([4]))
    frames = clips([2])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = encoder.resnet((yuv_to_rgb(frames.values) / 255 - mean) / std).pooler_output.flatten(1)
    torch.testing.assert_close(encoder(frames).values, expected, rtol=1e-4, atol=1e-5)
    assert encoder.bfloat16()(frames).values.dtype == torch.bfloat16


def test_colours_are_those_of_the_standard_and_of_ffmpeg() -> None:
    rng = np.random.default_rng(0)
    y = np.kron(rng.integers(16, 236, (4, 6)), np.ones((8, 8))).astype(np.uint8)
    u, v = (np.kron(rng.integers(70, 187, (4, 6)), np.ones((4, 4))).astype(np.uint8) for _ in range(2))
    planes = np.concatenate([y.ravel(), u.ravel(), v.ravel()]).reshape(48, 48)
    found = yuv_to_rgb(torch.from_numpy(planes)[None])[0].permute(1, 2, 0).numpy()
    assert found.shape == (32, 48, 3)
    # ITU-R BT.601: Y = 0.299 R + 0.587 G + 0.114 B, U and V the scaled differences of B and R to it.
    inside = ((found > 0) & (found < 255)).all(-1)
    red, green, blue = np.moveaxis(found, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    for plane, value in ((y, 16 + 219 * luma / 255), (u, 128 + 112 * (blue - luma) / (0.886 * 255))):
        full = plane if plane.shape == (32, 48) else np.kron(plane, np.ones((2, 2)))
        assert abs(value - full)[inside].max() < 1e-3
    full = np.kron(v, np.ones((2, 2)))
    assert abs(128 + 112 * (red - luma) / (0.701 * 255) - full)[inside].max() < 1e-3
    # FFmpeg's fast conversion rounds down, several times.
    theirs = VideoFrame.from_ndarray(planes, format="yuv420p").to_ndarray(format="rgb24")
    assert abs(found - theirs).max() <= 3


def test_narrow_frame_encoder_trains_at_full_resolution(command: Callable[..., CompletedProcess[str]]) -> None:
    """In a process of its own: convolution kernels have crashed on such shapes."""
    done = command(
        "-c",
        "import torch\n"
        "from sltscale.config import ResNetSettings\n"
        "from sltscale.models.frames import FrameEncoder\n"
        "from sltscale.structures import Ragged\n"
        "encoder = FrameEncoder(ResNetSettings(embedding_size=4, hidden_sizes=(4, 8), depths=(1, 1)))\n"
        "frames = Ragged.from_lengths(torch.zeros(5, 336, 224, dtype=torch.uint8), [5])\n"
        "encoder(frames).values.sum().backward()\n",
    )
    assert done.returncode == 0, done.stderr


def test_frame_encoder_with_uneven_stages_is_refused() -> None:
    with pytest.raises(InputError, match="one depth per stage"):
        FrameEncoder(FRAMES.model_copy(update={"depths": (1, 1, 1)}))


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_temporal_convolution_equals_each_clip_alone(kernel: int) -> None:
    layer = TemporalConvolution(6, kernel)
    lengths = [4, 1, 7, 2]
    packed = Ragged.from_lengths(torch.randn(14, 6), lengths)
    settle(layer, packed)
    for found, clip in zip(layer(packed).split(), packed.split(), strict=True):
        padded = F.pad(clip.T[None], ((kernel - 1) // 2, kernel // 2))
        expected = F.relu(layer.norm(F.conv1d(padded, layer.conv.weight)[0].T))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_temporal_norm_counts_valid_steps_only() -> None:
    layer = TemporalConvolution(3, 1)
    layer.conv.weight.data.copy_(torch.eye(3)[:, :, None])
    packed = Ragged.from_lengths(torch.randn(9, 3) + 4, [8, 1])
    layer(packed)
    torch.testing.assert_close(layer.norm.running_mean, 0.1 * packed.values.mean(0))


def test_one_clip_of_one_frame_trains() -> None:
    encoder = VisualEncoder(VISUAL)
    tokens = encoder(clips([1]))
    tokens.values.square().sum().backward()
    assert tokens.values.shape == (1, 24) and torch.isfinite(tokens.values).all()


def test_visual_encoder_gives_each_clip_what_it_gives_it_alone() -> None:
    frames = clips([5, 1, 9, 3])
    encoder = settle(VisualEncoder(VISUAL), frames)
    tokens = encoder(frames)
    assert tokens.max_seqlen == 9 and tokens.values.shape == (18, 24)
    for together, clip in zip(tokens.split(), frames.split(), strict=True):
        torch.testing.assert_close(encoder(Ragged.from_list([clip])).values, together, rtol=1e-5, atol=1e-5)


def test_longer_clips_than_positions_are_refused() -> None:
    with pytest.raises(InputError, match="33 visual tokens, the transformer has 32"):
        TransformerEncoder(BLOCKS)(torch.zeros(1, 33, 24), torch.ones(1, 33, dtype=torch.bool))
    with pytest.raises(InputError, match="multiple"):
        TransformerEncoder(BLOCKS.model_copy(update={"heads": 5}))


def test_transformer_encoder_ignores_what_stands_in_the_padding() -> None:
    encoder = TransformerEncoder(BLOCKS)
    values, mask = torch.randn(2, 6, 24), torch.arange(6)[None] < torch.tensor([[6], [3]])
    other = torch.where(mask[..., None], values, torch.randn(2, 6, 24))
    torch.testing.assert_close(encoder(values, mask)[mask], encoder(other, mask)[mask], rtol=0, atol=1e-6)


def test_text_encoder_sees_both_ways_and_the_decoder_only_back() -> None:
    ids, mask = torch.randint(3, 40, (1, 6)), torch.ones(1, 6, dtype=torch.long)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] - 3 + 1) % 37 + 3
    encoder, decoder = TextEncoder(BLOCKS, VOCABULARY), TextDecoder(BLOCKS, VOCABULARY)
    assert not torch.allclose(encoder(ids, mask)[0, 0], encoder(changed, mask)[0, 0])
    memory, memory_mask = torch.randn(1, 3, 24), torch.ones(1, 3, dtype=torch.bool)
    before, after = decoder(ids, memory, memory_mask), decoder(changed, memory, memory_mask)
    assert before.shape == (1, 6, 40)
    torch.testing.assert_close(before[0, :4], after[0, :4])
    assert not torch.allclose(before[0, 4], after[0, 4])
    assert not torch.allclose(decoder(ids, memory + 1, memory_mask), before)


def test_teacher_forcing_starts_from_the_language_code() -> None:
    ids = torch.tensor([[7, 8, 9, 2, 33], [7, 2, 34, 1, 1]])
    inputs, labels = teacher_forcing(TextBatch(ids, (ids != 1).long()), VOCABULARY)
    assert inputs[0].tolist() == [33, 7, 8, 9, 2]
    assert inputs[1, :3].tolist() == [34, 7, 2]
    assert labels.tolist() == [[7, 8, 9, 2, 33], [7, 2, 34, -100, -100]]
    one = teacher_forcing(TextBatch(ids[:1], torch.ones(1, 5)), VOCABULARY)[0]
    assert one.tolist() == [[33, 7, 8, 9, 2]]


def decoding_model() -> tuple[MBartForConditionalGeneration, Tensor, Tensor, Tensor]:
    model = build_mbart(LANGUAGE, VOCABULARY).eval()
    for name, parameter in model.named_parameters():  # larger weights, so that hypotheses hang on the input
        parameter.data.mul_(16 if "encoder_attn." in name else 4)
    lengths = torch.tensor([[6], [2], [4], [1]])
    return model, torch.randn(4, 6, 32), torch.arange(6)[None] < lengths, torch.tensor([33, 34, 33, 35])


@pytest.mark.parametrize("beams", [1, 4])
def test_generation_in_a_batch_equals_one_by_one(beams: int) -> None:
    model, inputs, mask, languages = decoding_model()
    options = {"beams": beams, "length_penalty": 1.0, "max_new_tokens": 9}
    together = beam_search(model, COUPLING, inputs, mask, languages, **options)
    alone = []
    for row in range(4):
        steps = int(mask[row].sum())
        alone += beam_search(
            model,
            COUPLING,
            inputs[row : row + 1, :steps],
            mask[row : row + 1, :steps],
            languages[row : row + 1],
            **options,
        )
    assert together == alone
    assert len({tuple(ids) for ids in together}) > 1
    assert all(0 < len(ids) <= 9 and not {1, 2} & set(ids) for ids in together)


def test_greedy_generation_follows_the_logits_from_the_language_code() -> None:
    model, inputs, mask, languages = decoding_model()
    hypotheses = beam_search(model, COUPLING, inputs, mask, languages, beams=1, length_penalty=1.0, max_new_tokens=7)
    for row in range(4):
        ids = [int(languages[row])]
        while len(ids) <= 7:
            logits = model(
                inputs_embeds=inputs[row : row + 1],
                attention_mask=mask[row : row + 1],
                decoder_input_ids=torch.tensor([ids]),
            ).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == VOCABULARY.eos_id:
                ids.pop()
                break
        assert hypotheses[row] == ids[1:]


def test_generation_longer_than_the_decoder_is_refused() -> None:
    model, inputs, mask, languages = decoding_model()
    with pytest.raises(InputError, match="max_new_tokens 1024"):
        beam_search(model, COUPLING, inputs, mask, languages, beams=1, length_penalty=1.0, max_new_tokens=1024)


def test_translator_logits_and_generation() -> None:
    frames = clips([4, 2])
    language_model = build_mbart(LANGUAGE, VOCABULARY)
    translator = Translator(
        VisualEncoder(VISUAL), nn.Linear(VISUAL.transformer.width, LANGUAGE.width), language_model, COUPLING
    )
    ids = torch.randint(3, 40, (2, 5))
    assert translator.logits(frames, TextBatch(ids, torch.ones_like(ids))).shape == (2, 5, 40)
    hypotheses = translator.eval().generate(
        frames, torch.tensor([33, 34]), beams=2, length_penalty=1.0, max_new_tokens=4
    )
    assert len(hypotheses) == 2 and all(len(ids) <= 4 for ids in hypotheses)


def tiny_mbart(folder: Path, size: int = 40) -> str:
    config = MBartConfig(
        vocab_size=size,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        scale_embedding=True,
        num_beams=7,
        dropout=0.1,
    )
    MBartForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return str(folder)


def test_published_language_model_loads_from_a_folder(tmp_path: Path) -> None:
    settings = LanguageModelSettings(pretrained=tiny_mbart(tmp_path), dropout=0.25, attention_dropout=0.15)
    model = build_mbart(settings, VOCABULARY)
    assert (model.config.decoder_layers, model.config.dropout, model.config.attention_dropout) == (2, 0.25, 0.15)
    assert model.dtype == torch.float32
    stored = MBartForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, stored[name].float(), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"40 token ids.*tokenizer has 41"):
        build_mbart(settings, Vocabulary(41, 1, 2))


def test_published_resnet_loads_from_a_classifier_checkpoint(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 2], layer_type="basic")
    classifier = ResNetForImageClassification(config)
    classifier(torch.randn(4, 3, 32, 32))
    classifier.save_pretrained(tmp_path)
    encoder = FrameEncoder(ResNetSettings(pretrained=str(tmp_path)))
    assert encoder.width == 24
    for name, value in ResNetModel.from_pretrained(tmp_path).state_dict().items():
        torch.testing.assert_close(encoder.resnet.state_dict()[name], value, rtol=0, atol=0)


def test_missing_or_incomplete_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    absent = str(tmp_path / "absent")
    with pytest.raises(InputError, match=r"absent.*config\.json and model\.safetensors"):
        build_mbart(LanguageModelSettings(pretrained=absent), VOCABULARY)
    with pytest.raises(InputError, match="absent"):
        FrameEncoder(ResNetSettings(pretrained=absent))
    folder = tmp_path / "mbart"
    tiny_mbart(folder)
    with pytest.raises(InputError, match=r"MBart|ResNet") as raised:
        FrameEncoder(ResNetSettings(pretrained=str(folder)))
    assert "\n" not in str(raised.value)
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")  # a pickle by its name: never opened
    with pytest.raises(InputError, match="safetensors"):
        build_mbart(LanguageModelSettings(pretrained=str(folder)), VOCABULARY)
