"""The temporal encoders against their papers' own numbers, and against obvious loops where they mend those."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from sltscale.models.local_temporal import LocalTemporalEncoder, LocalTemporalSettings, halve
from sltscale.models.packed_temporal import PackedTemporalEncoder, PackedTemporalSettings, edge_copies
from sltscale.structures import Ragged

GOLDEN = Path(__file__).parents[1] / "golden"
SIGN2GPT = LocalTemporalSettings(
    width=32, heads=4, feed_forward=128, norm_input=False, scale_feed_forward=True, output_width=None
)


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name, allow_pickle=False) as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest value."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=tolerance * scale)


# ryanwongsa/Sign2GPT@5555935 models/metaformer, float64, stored as float32: inputs and weights are exact to 6e-8.


def sign2gpt_names(names: dict[str, Tensor]) -> dict[str, list[str]]:
    """Our parameter name -> the reference's, in the order in which they are joined."""
    found = {"input.weight": ["embedding_block.linear.weight"], "input.bias": ["embedding_block.linear.bias"]}
    for ours, stage in (("before", 0), ("after", 2)):
        for block in range(2):
            theirs = f"network_block.network.{stage}.{block}"
            found[f"{ours}.{block}.attention_scale"] = [f"{theirs}.layer_scale_1"]
            found[f"{ours}.{block}.feed_forward_scale"] = [f"{theirs}.layer_scale_2"]
            for kind in ("weight", "bias"):
                projections = [f"{theirs}.token_mixer.in_proj_container.{x}_proj.{kind}" for x in "qkv"]
                found[f"{ours}.{block}.qkv.{kind}"] = projections
                found[f"{ours}.{block}.attention_output.{kind}"] = [f"{theirs}.token_mixer.proj.{kind}"]
                found[f"{ours}.{block}.feed_forward.0.{kind}"] = [f"{theirs}.mlp.mlp.0.{kind}"]
                found[f"{ours}.{block}.feed_forward.3.{kind}"] = [f"{theirs}.mlp.mlp.3.{kind}"]
                found[f"{ours}.{block}.attention_norm.{kind}"] = [f"{theirs}.norm1.{kind}"]
                found[f"{ours}.{block}.feed_forward_norm.{kind}"] = [f"{theirs}.norm2.{kind}"]
    assert sorted(name for theirs in found.values() for name in theirs) == sorted(names)
    return found


def sign2gpt(settings: LocalTemporalSettings, dtype: torch.dtype) -> LocalTemporalEncoder:
    weights = arrays("e_sign2gpt_weights.npz")
    encoder = LocalTemporalEncoder(24, settings).to(dtype).eval()
    names = sign2gpt_names(weights)
    encoder.load_state_dict({ours: torch.cat([weights[x] for x in theirs]) for ours, theirs in names.items()})
    return encoder


@pytest.fixture(scope="module")
def golden_e() -> dict[str, Tensor]:
    return arrays("e_sign2gpt_temporal_encoder.npz")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_sign2gpt_as_it_is(golden_e: dict[str, Tensor], dtype: torch.dtype, tolerance: float) -> None:
    encoder = sign2gpt(SIGN2GPT, dtype)
    x = golden_e["x"].to(dtype).requires_grad_()
    stages = encoder.padded_stages(encoder.input(x), golden_e["mask"])
    for number, (values, mask) in enumerate(stages):
        assert mask.equal(golden_e[f"feature{number}_mask"])
        close(values[mask], golden_e[f"feature{number}"][mask], tolerance)
    output, mask = stages[-1]
    close(output[mask], golden_e["output"][mask], tolerance)

    (output * golden_e["loss_weights"] * mask[..., None]).sum().backward()
    assert x.grad is not None
    close(x.grad, golden_e["grad_x"], tolerance)
    gradients = {name.removeprefix("grad."): value for name, value in golden_e.items() if name.startswith("grad.")}
    parameters = dict(encoder.named_parameters())
    for ours, theirs in sign2gpt_names(gradients).items():
        gradient = parameters[ours].grad
        assert gradient is not None, ours
        close(gradient, torch.cat([gradients[name] for name in theirs]), tolerance)


def test_packed_steps_equal_sign2gpt_up_to_where_padding_leaks(golden_e: dict[str, Tensor]) -> None:
    encoder, mask = sign2gpt(SIGN2GPT, torch.float64), golden_e["mask"]
    sequence = Ragged.from_lengths(golden_e["x"].double()[mask], mask.sum(1).tolist())
    positioned, first, halved, _ = encoder.stages(sequence.with_values(encoder.input(sequence.values)))
    close(positioned.values, golden_e["feature0"][mask], 1e-6)
    close(first.values, golden_e["feature1"][mask], 1e-6)
    assert halved.lengths.tolist() == golden_e["feature2_mask"].sum(1).tolist()
    for clip, expected in zip(halved.split(), golden_e["feature2"], strict=True):
        close(clip[1:-1], expected[1 : len(clip) - 1], 1e-6)  # the ends are means of two steps here, of three there


def test_reference_padding_gives_clips_of_even_length_a_segment_more() -> None:
    encoder = sign2gpt(SIGN2GPT.model_copy(update={"padding": "reference"}), torch.float64)
    sequence = Ragged.from_lengths(
        torch.randn(48, 24, generator=torch.Generator().manual_seed(0)).double(), [21, 13, 14]
    )
    output = encoder(sequence)
    assert output.lengths.tolist() == [11, 7, 8] and output.max_seqlen == 11

    embedded, mask = sequence.with_values(encoder.input(sequence.values)).to_padded()
    values, segments = encoder.padded_stages(embedded, mask)[-1]
    close(torch.cat(output.split()), values[segments], 1e-12)
    # the zeros behind the second clip reach it: this is the fault that "none" mends
    alone = encoder(Ragged.from_list([sequence.split()[1]]))
    assert (output.split()[1] - alone.values).abs().max() > 0.01


# The corrected encoder.


def test_no_clip_knows_of_another() -> None:
    torch.manual_seed(0)
    settings = LocalTemporalSettings(width=32, heads=2, feed_forward=64, output_width=12, layer_scale=1.0)
    encoder = LocalTemporalEncoder(24, settings).double().eval()
    clips = [torch.randn(length, 24, dtype=torch.float64) for length in (1, 2, 13, 40, 0, 7, 14)]
    together = encoder(Ragged.from_list(clips))
    assert together.lengths.tolist() == [1, 1, 7, 20, 0, 4, 7] and together.max_seqlen == 20
    for clip, output in zip(clips, together.split(), strict=True):
        if len(clip):
            close(output, encoder(Ragged.from_list([clip])).values, 1e-12)


def test_halve_equals_a_loop() -> None:
    clips = [torch.randn(length, 3, dtype=torch.float64) for length in (5, 1, 0, 4, 2, 3, 8)]
    halved = halve(Ragged.from_list(clips))
    assert halved.max_seqlen == 4
    for clip, output in zip(clips, halved.split(), strict=True):
        expected = [clip[max(0, i - 1) : i + 2].mean(0) for i in range(0, len(clip), 2)]
        assert len(expected) == len(output)
        for one, other in zip(expected, output, strict=True):
            close(other, one, 1e-12)


def test_parameters_are_as_many_as_in_hfa() -> None:
    """12,883,456 of frame adapter and temporal encoder, of which 73,728 are LoRA; 525,312 of the last linear layer."""
    with torch.device("meta"):
        encoder = LocalTemporalEncoder(384, LocalTemporalSettings())
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 12_883_456 - 73_728 + 525_312


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    encoder = LocalTemporalEncoder(
        24, LocalTemporalSettings(width=32, heads=2, feed_forward=64, scale_feed_forward=True)
    )
    encoder(Ragged.from_list([torch.randn(length, 24) for length in (9, 20)])).values.square().sum().backward()
    silent = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    torch.manual_seed(0)
    encoder = LocalTemporalEncoder(
        24, LocalTemporalSettings(width=32, heads=2, feed_forward=64, layer_scale=1.0)
    ).eval()
    sequence = Ragged.from_list([torch.randn(length, 24) for length in (9, 200)])
    exact = encoder(sequence).values
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not autocast:
            encoder, sequence = encoder.bfloat16(), sequence.with_values(sequence.values.bfloat16())
        found = encoder(sequence).values
    assert torch.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.999


def test_drop_path_leaves_a_branch_out_of_whole_clips() -> None:
    torch.manual_seed(0)
    settings = LocalTemporalSettings(
        width=16,
        heads=2,
        feed_forward=32,
        layers=(1, 1),
        output_width=None,
        dropout=0.0,
        drop_path=0.5,
        layer_scale=1.0,
    )
    encoder = LocalTemporalEncoder(24, settings).double()
    clip = torch.randn(6, 24, dtype=torch.float64)
    encoder.norm.eval()  # batch norm would make the copies differ from a single one
    copies = encoder(Ragged.from_list([clip] * 64)).values.view(64, -1)
    outcomes = copies.unique(dim=0)
    assert len(outcomes) == 4  # attention kept or not, feed-forward kept or not

    encoder.eval()
    block = encoder.after[0]
    assert not (outcomes - encoder(Ragged.from_list([clip])).values.flatten()).abs().amax(1).min() < 1e-6
    with torch.no_grad():  # kept branches are scaled by 1 / (1 - 0.5)
        for layer in (block.attention_output, block.feed_forward[3]):
            layer.weight.mul_(2)
            layer.bias.mul_(2)
    assert (outcomes - encoder(Ragged.from_list([clip])).values.flatten()).abs().amax(1).min() < 1e-12


@pytest.mark.parametrize("found", [{"window": 6}, {"width": 24, "heads": 8}, {"padding": "longest"}])
def test_settings_that_cannot_be(found: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LocalTemporalSettings.model_validate(found)


# zhoubenjia/GFSLT-VLP@91ba953 models.py and datasets.py, float64.

GFSLT_NAMES = {
    "first.conv": "temporal.temporal_conv.0",
    "first.norm": "temporal.temporal_conv.1",
    "second.conv": "temporal.temporal_conv.4",
    "second.norm": "temporal.temporal_conv.5",
    "sign_embedding.linear": "sign_emb.src_emb",
    "sign_embedding.norm": "sign_emb.bn_ac.0",
}
BUFFERS = ("running_mean", "running_var")


@pytest.fixture(scope="module")
def golden_f() -> dict[str, Tensor]:
    return arrays("f_gfslt_temporal.npz")


def gfslt(golden: dict[str, Tensor], *, sign_embedding: bool, norm_over: str) -> PackedTemporalEncoder:
    settings = PackedTemporalSettings.model_validate(
        {"width": 24, "sign_embedding": sign_embedding, "norm_over": norm_over}
    )
    encoder = PackedTemporalEncoder(16, settings).double()
    state = {}
    for ours, theirs in GFSLT_NAMES.items():
        for kind in ("weight", "bias", *BUFFERS):
            if f"state.{theirs}.{kind}" in golden and (sign_embedding or not ours.startswith("sign")):
                state[f"{ours}.{kind}"] = golden[f"state.{theirs}.{kind}"]
    missing = encoder.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    return encoder


def copied_features(golden: dict[str, Tensor], requires_grad: bool = False) -> Ragged:
    """Features of clips of 17, 29 and 40 frames with their edge copies."""
    features = golden["frame_features_flat"].clone().requires_grad_(requires_grad)
    return Ragged.from_lengths(features, golden["collate_src_length"].tolist())


def test_edge_copies_are_gfslts(golden_f: dict[str, Tensor]) -> None:
    frames = [100 * clip + torch.arange(length) for clip, length in ((1, 17), (2, 29), (3, 40))]
    copied = edge_copies(Ragged.from_list(frames))
    assert copied.values.equal(golden_f["collate_frame_ids"].long())
    assert copied.lengths.equal(golden_f["collate_src_length"].int())
    assert copied.max_seqlen == 56


def test_lengths_from_1_to_300_are_gfslts(golden_f: dict[str, Tensor]) -> None:
    encoder = PackedTemporalEncoder(2, PackedTemporalSettings(width=2))
    lengths = golden_f["raw_len"].tolist()
    assert lengths == list(range(1, 301))
    sequence = Ragged.from_lengths(torch.randn(sum(lengths), 2), lengths)
    assert edge_copies(sequence).lengths.equal(golden_f["padded_len"].int())
    tokens = encoder(sequence)
    assert tokens.lengths.equal(golden_f["token_len"].int())
    assert tokens.max_seqlen == 76 and tokens.cu_seqlens[[0, -1]].tolist() == [0, len(tokens.values)]


@pytest.mark.parametrize("norm_over", ["valid", "padded"])
@pytest.mark.parametrize("sign_embedding, name", [(False, "eval_temporal"), (True, "eval_sign_emb")])
def test_gfslt_in_evaluation(golden_f: dict[str, Tensor], sign_embedding: bool, name: str, norm_over: str) -> None:
    encoder = gfslt(golden_f, sign_embedding=sign_embedding, norm_over=norm_over).eval()
    tokens = encoder.tokens(copied_features(golden_f))
    mask = golden_f["mask"].bool()
    assert tokens.mask().equal(mask) and mask.equal(golden_f["collate_attention_mask"].bool())
    close(tokens.values, golden_f[name][mask], 1e-9)


def test_gfslt_in_training_as_it_is(golden_f: dict[str, Tensor]) -> None:
    mask = golden_f["mask"].bool()
    without = gfslt(golden_f, sign_embedding=False, norm_over="padded")
    close(without.tokens(copied_features(golden_f)).values, golden_f["train_temporal"][mask], 1e-9)

    encoder = gfslt(golden_f, sign_embedding=True, norm_over="padded")
    features = copied_features(golden_f, requires_grad=True)
    tokens = encoder.tokens(features)
    close(tokens.values, golden_f["train_sign_emb"][mask], 1e-9)
    loss = (tokens.values * golden_f["train_loss_weights"][mask]).sum()
    close(loss, golden_f["train_loss"], 1e-9)
    loss.backward()
    assert features.values.grad is not None
    close(features.values.grad, golden_f["train_grad_flat"], 1e-9)
    state, parameters = encoder.state_dict(), dict(encoder.named_parameters())
    for ours, theirs in GFSLT_NAMES.items():
        for kind in ("weight", "bias"):
            gradient = parameters[f"{ours}.{kind}"].grad
            assert gradient is not None
            close(gradient, golden_f[f"train_grad.{theirs}.{kind}"], 1e-9)
        for kind in BUFFERS:
            if ours.endswith("norm"):
                close(state[f"{ours}.{kind}"], golden_f[f"train_after.{theirs}.{kind}"], 1e-9)


# The corrected convolution.


def slow_tokens(encoder: PackedTemporalEncoder, clips: list[Tensor]) -> list[Tensor]:
    """Clip by clip, but for the batch norms, which see all valid steps of all clips."""

    def block(conv: nn.Conv1d, norm: nn.Module, clips: list[Tensor]) -> list[Tensor]:
        convolved = [F.conv1d(clip.T[None], conv.weight, conv.bias)[0].T for clip in clips]
        plain = nn.BatchNorm1d(norm.num_features).double()
        plain.load_state_dict(norm.state_dict())
        activated = F.relu(plain(torch.cat(convolved))).split([len(clip) for clip in convolved])
        return [F.max_pool1d(clip.T[None], 2)[0].T for clip in activated]

    copied = []
    for clip in clips:
        behind = 4 * -(-len(clip) // 4) + 8 - len(clip)
        copied.append(torch.cat([clip[:1]] * 8 + [clip] + [clip[-1:]] * behind))
    tokens = block(encoder.first.conv, encoder.first.norm, copied)
    tokens = block(encoder.second.conv, encoder.second.norm, tokens)
    assert encoder.sign_embedding is not None
    embedded = encoder.sign_embedding.linear(torch.cat(tokens))
    normed = F.relu(F.batch_norm(embedded, None, None, *encoder.sign_embedding.norm.parameters(), training=True))
    return list(normed.split([len(clip) for clip in tokens]))


def test_batch_norm_counts_valid_steps_only(golden_f: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(length, 16, dtype=torch.float64, generator=generator) for length in (17, 1, 40, 4)]
    weights = torch.randn(6 + 2 + 11 + 2, 24, dtype=torch.float64, generator=generator)

    for clip in clips:
        clip.requires_grad_()
    encoder = gfslt(golden_f, sign_embedding=True, norm_over="valid")
    slow = slow_tokens(encoder, clips)
    found = encoder(Ragged.from_list(clips)).split()
    for one, other in zip(found, slow, strict=True):
        close(one, other, 1e-9)
    for one, other in zip(
        torch.autograd.grad((torch.cat(found) * weights).sum(), clips),
        torch.autograd.grad((torch.cat(slow) * weights).sum(), clips),
        strict=True,
    ):
        close(one, other, 1e-9)


def test_lengths_without_edge_copies_are_refused() -> None:
    encoder = PackedTemporalEncoder(4, PackedTemporalSettings(width=4))
    with pytest.raises(ValueError, match="multiples of 4; longest 22"):
        encoder.tokens(Ragged.from_list([torch.randn(22, 4), torch.randn(18, 4)]))
    with pytest.raises(ValueError, match="sequence 1 has no steps"):
        edge_copies(Ragged.from_list([torch.randn(3, 4), torch.randn(0, 4)]))
