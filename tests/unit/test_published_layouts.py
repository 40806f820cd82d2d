"""Folders with the files and the weights' names of published checkpoints, at a tiny size: everything in them is loaded.

The names are written out as they stand in the files on the hub, not taken from the installed transformers, which has
renamed some since (DINOv2's attention) and no longer stores others (tied embeddings).
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MBartForConditionalGeneration,
    MT5ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetModel,
)
from transformers import ResNetForImageClassification as Classifier

from sltscale.config import (
    CausalSettings,
    DinoSettings,
    LanguageModelSettings,
    MT5Settings,
    ResNetSettings,
    TextEncoderSettings,
)
from sltscale.errors import InputError
from sltscale.methods.base import build_method
from sltscale.models.causal import build_causal
from sltscale.models.dino import DinoEncoder
from sltscale.models.frames import FrameEncoder
from sltscale.models.language import TextEncoder, Vocabulary
from sltscale.models.mbart import build_mbart
from sltscale.models.mt5 import build_mt5
from sltscale.recipe_files import load_recipe

Weights = dict[str, Tensor]
VOCABULARY = Vocabulary(size=40, pad_id=1, eos_id=2)
MBART_TIED = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear(name: str, out: int, width: int, bias: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", torch.randn(out, width)
    if bias:
        yield f"{name}.bias", torch.randn(out)


def norm(name: str, width: int, bias: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", torch.rand(width)
    if bias:
        yield f"{name}.bias", torch.randn(width)


def mbart(folder: Path, tied: Sequence[str] = MBART_TIED, bias: bool = True) -> Weights:
    """facebook/mbart-large-cc25: 40 ids, width 16, 2 + 1 layers. tied: names that the embedding has beside its own."""
    config = {
        "_num_labels": 3,
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "add_bias_logits": False,
        "add_final_layer_norm": True,
        "architectures": ["MBartForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "classif_dropout": 0.0,
        "classifier_dropout": 0.0,
        "d_model": 16,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 24,
        "decoder_layerdrop": 0.0,
        "decoder_layers": 1,
        "dropout": 0.1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "encoder_layerdrop": 0.0,
        "encoder_layers": 2,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "max_position_embeddings": 32,
        "model_type": "mbart",
        "normalize_before": True,
        "normalize_embedding": True,
        "num_beams": 5,
        "num_hidden_layers": 2,
        "output_past": True,
        "pad_token_id": 1,
        "scale_embedding": True,
        "static_position_embeddings": False,
        "task_specific_params": {"translation_en_to_ro": {"decoder_start_token_id": 34}},
        "vocab_size": 40,
    }
    weights = {"model.shared.weight": torch.randn(40, 16)}
    weights |= {name: weights["model.shared.weight"].clone() for name in tied}
    if bias:
        weights["final_logits_bias"] = torch.zeros(1, 40)
    for side, layers, attentions in (
        ("encoder", 2, ["self_attn"]),
        ("decoder", 1, ["self_attn", "encoder_attn"]),
    ):
        weights[f"model.{side}.embed_positions.weight"] = torch.randn(34, 16)  # the first two are never used
        for layer in range(layers):
            block = f"model.{side}.layers.{layer}"
            for attention in attentions:
                for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    weights |= linear(f"{block}.{attention}.{projection}", 16, 16)
                weights |= norm(f"{block}.{attention}_layer_norm", 16)
            weights |= dict(linear(f"{block}.fc1", 24, 16)) | dict(linear(f"{block}.fc2", 16, 24))
            weights |= norm(f"{block}.final_layer_norm", 16)
        weights |= dict(norm(f"model.{side}.layernorm_embedding", 16)) | dict(norm(f"model.{side}.layer_norm", 16))
    return written(folder, config, weights)


def dinov2(folder: Path) -> Weights:
    """facebook/dinov2-small: width 12, 2 layers, images of 28 pixels."""
    config = {
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": 12,
        "image_size": 28,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-06,
        "layerscale_value": 1.0,
        "mlp_ratio": 4,
        "model_type": "dinov2",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "qkv_bias": True,
        "torch_dtype": "float32",
        "transformers_version": "4.32.0.dev0",
        "use_swiglu_ffn": False,
    }
    weights = {
        "embeddings.cls_token": torch.randn(1, 1, 12),
        "embeddings.mask_token": torch.randn(1, 12),
        "embeddings.position_embeddings": torch.randn(1, 5, 12),
        "embeddings.patch_embeddings.projection.weight": torch.randn(12, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": torch.randn(12),
    }
    for layer in range(2):
        block = f"encoder.layer.{layer}"
        for projection in ("query", "key", "value"):
            weights |= linear(f"{block}.attention.attention.{projection}", 12, 12)
        weights |= linear(f"{block}.attention.output.dense", 12, 12)
        weights |= dict(linear(f"{block}.mlp.fc1", 48, 12)) | dict(linear(f"{block}.mlp.fc2", 12, 48))
        for number in (1, 2):
            weights |= norm(f"{block}.norm{number}", 12)
            weights[f"{block}.layer_scale{number}.lambda1"] = torch.rand(12)
    weights |= norm("layernorm", 12)
    return written(folder, config, weights)


def resnet(folder: Path) -> Weights:
    """microsoft/resnet-18, a classifier: widths 8 and 16, depths 1 and 2."""
    config = {
        "architectures": ["ResNetForImageClassification"],
        "depths": [1, 2],
        "downsample_in_first_stage": False,
        "embedding_size": 8,
        "hidden_act": "relu",
        "hidden_sizes": [8, 16],
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
        "layer_type": "basic",
        "model_type": "resnet",
        "num_channels": 3,
        "torch_dtype": "float32",
        "transformers_version": "4.18.0.dev0",
    }
    weights: Weights = {}

    def convolution(name: str, out: int, width: int, kernel: int) -> None:
        weights[f"{name}.convolution.weight"] = torch.randn(out, width, kernel, kernel)
        weights.update(norm(f"{name}.normalization", out))
        weights[f"{name}.normalization.running_mean"] = torch.randn(out)
        weights[f"{name}.normalization.running_var"] = torch.rand(out)
        weights[f"{name}.normalization.num_batches_tracked"] = torch.tensor(7)

    convolution("resnet.embedder.embedder", 8, 3, 7)
    for stage, (width, depth) in enumerate(((8, 1), (16, 2))):
        for layer in range(depth):
            block, inside = f"resnet.encoder.stages.{stage}.layers.{layer}", 8 if layer == 0 else width
            if stage == 1 and layer == 0:
                convolution(f"{block}.shortcut", width, inside, 1)
            convolution(f"{block}.layer.0", width, inside, 3)
            convolution(f"{block}.layer.1", width, width, 3)
    weights |= linear("classifier.1", 3, 16)
    return written(folder, config, weights)


def mt5(folder: Path) -> Weights:
    """google/mt5-base: 48 ids, width 16, 1 + 1 layers, an output layer of its own."""
    config = {
        "architectures": ["MT5ForConditionalGeneration"],
        "d_ff": 24,
        "d_kv": 8,
        "d_model": 16,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "mt5",
        "num_decoder_layers": 1,
        "num_heads": 2,
        "num_layers": 1,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "tokenizer_class": "T5Tokenizer",
        "vocab_size": 48,
    }
    weights = {"shared.weight": torch.randn(48, 16)}
    for side, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        weights[f"{side}.embed_tokens.weight"] = weights["shared.weight"].clone()
        block = f"{side}.block.0.layer"
        for layer, attention in enumerate(attentions):
            for projection in "qkvo":
                weights |= linear(f"{block}.{layer}.{attention}.{projection}", 16, 16, bias=False)
            weights |= norm(f"{block}.{layer}.layer_norm", 16, bias=False)
        weights[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = torch.randn(32, 2)
        last = len(attentions)
        for projection, (out, width) in {"wi_0": (24, 16), "wi_1": (24, 16), "wo": (16, 24)}.items():
            weights |= linear(f"{block}.{last}.DenseReluDense.{projection}", out, width, bias=False)
        weights |= norm(f"{block}.{last}.layer_norm", 16, bias=False)
        weights |= norm(f"{side}.final_layer_norm", 16, bias=False)
    weights |= linear("lm_head", 48, 16, bias=False)
    return written(folder, config, weights)


def written(folder: Path, config: dict[str, Any], weights: Weights) -> Weights:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def nothing_left(model_class: Any, folder: Path) -> None:
    _, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert {name: list(found) for name, found in report.items() if found} == {}


def same(model: torch.nn.Module, weights: Weights) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


# The pickled file on the hub stores the embedding under several names, its safetensors form under one of them.
@pytest.mark.parametrize("tied", [MBART_TIED, MBART_TIED[:2], ()], ids=["four names", "three names", "one name"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_mbart(tied: Sequence[str], bias: bool, tmp_path: Path) -> None:
    weights = mbart(tmp_path, tied, bias)
    nothing_left(MBartForConditionalGeneration, tmp_path)
    expected = weights | dict.fromkeys(MBART_TIED, weights["model.shared.weight"])
    expected.setdefault("final_logits_bias", torch.zeros(1, 40))
    model = build_mbart(LanguageModelSettings(pretrained=str(tmp_path)), VOCABULARY)
    assert model.state_dict().keys() == expected.keys()
    same(model, expected)
    encoder = TextEncoder(TextEncoderSettings(pretrained=str(tmp_path)), VOCABULARY)
    prefix = "model.encoder."
    own = {name.removeprefix(prefix): tensor for name, tensor in expected.items() if name.startswith(prefix)}
    assert encoder.blocks.state_dict().keys() == own.keys()
    same(encoder.blocks, own)


def test_c2rl_with_the_sentence_encoder_of_mbart(tmp_path: Path) -> None:
    """Which is of another width than the visual tokens: a linear layer brings it to theirs."""
    weights = mbart(tmp_path, (), True)
    given = ["--method.text_encoder.pretrained", str(tmp_path)]
    with pytest.raises(InputError, match=r"is 16 wide: set method\.text_encoder\.width"):
        build_method(load_recipe("c2rl_pretrain_tiny", given).method, VOCABULARY)
    settings = load_recipe("c2rl_pretrain_tiny", [*given, "--method.text_encoder.width", "16"])
    method = build_method(settings.method, VOCABULARY)
    prefix = "model.encoder.layers."
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    same(method.get_submodule("text_encoder.blocks.layers"), own)
    projection, width = method.get_submodule("text_projection"), weights["model.shared.weight"].shape[1]
    assert (projection.in_features, projection.out_features) == (width, settings.method.visual.transformer.width)


def test_dinov2(tmp_path: Path) -> None:
    weights = dinov2(tmp_path)
    nothing_left(Dinov2Model, tmp_path)
    new_names = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    expected = {}
    for name, tensor in weights.items():
        for old, new in new_names.items():
            name = name.replace(old, new)
        expected[name] = tensor
    dino = DinoEncoder(DinoSettings(pretrained=str(tmp_path), lora_blocks=0)).dino
    assert dino.state_dict().keys() == expected.keys()
    same(dino, expected)
    # the adapted blocks hold the three projections as one
    adapted = DinoEncoder(DinoSettings(pretrained=str(tmp_path), lora_blocks=1)).dino.encoder.layer[1]
    parts = [weights[f"encoder.layer.1.attention.attention.{name}.weight"] for name in ("query", "key", "value")]
    torch.testing.assert_close(adapted.attention.qkv.base_layer.weight, torch.cat(parts), rtol=0, atol=0)


def test_resnet(tmp_path: Path) -> None:
    weights = resnet(tmp_path)
    nothing_left(Classifier, tmp_path)
    _, report = ResNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert {name.split(".")[0] for name in report["unexpected_keys"]} <= {"classifier"}  # which is not wanted
    expected = {
        name.removeprefix("resnet."): tensor for name, tensor in weights.items() if not name.startswith("classifier.")
    }
    model = FrameEncoder(ResNetSettings(pretrained=str(tmp_path))).resnet
    assert model.state_dict().keys() == expected.keys()
    same(model, expected)


def test_mt5(tmp_path: Path) -> None:
    weights = mt5(tmp_path)
    nothing_left(MT5ForConditionalGeneration, tmp_path)
    model = build_mt5(MT5Settings(architecture="mt5", pretrained=str(tmp_path)), Vocabulary(44, pad_id=0, eos_id=1))
    assert model.state_dict().keys() == weights.keys()
    same(model, weights)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)


DECODER = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2}


# meta-llama and Qwen: the output layer is the embedding (small models, stored once) or a matrix of its own; Qwen has
# biases on queries, keys and values. As one file, and in shards with an index, as large ones are published.
@pytest.mark.parametrize("shards", ["5GB", "4KB"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own output layer"])
@pytest.mark.parametrize(
    ("model_class", "config_class", "biases"),
    [(LlamaForCausalLM, LlamaConfig, ()), (Qwen2ForCausalLM, Qwen2Config, ("q_proj", "k_proj", "v_proj"))],
    ids=["llama", "qwen2"],
)
def test_decoder_only(
    model_class: Any, config_class: Any, biases: Sequence[str], tied: bool, shards: str, tmp_path: Path
) -> None:
    names = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    for layer in range(2):
        block = f"model.layers.{layer}"
        names |= {f"{block}.self_attn.{projection}_proj.weight" for projection in "qkvo"}
        names |= {f"{block}.self_attn.{projection}.bias" for projection in biases}
        names |= {f"{block}.mlp.{projection}_proj.weight" for projection in ("gate", "up", "down")}
        names |= {f"{block}.{norm}_layernorm.weight" for norm in ("input", "post_attention")}
    published = model_class(config_class(**DECODER, eos_token_id=[3, 2], tie_word_embeddings=tied))
    published.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == "5GB")
    weights = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert weights.keys() == names
    nothing_left(AutoModelForCausalLM, tmp_path)
    settings = CausalSettings(architecture="causal", pretrained=str(tmp_path))
    model = build_causal(settings, Vocabulary(44, pad_id=2, eos_id=2))
    assert type(model) is model_class
    same(model, weights | ({"lm_head.weight": weights["model.embed_tokens.weight"]} if tied else {}))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_code_that_comes_with_weights_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(InputError, match="cannot be loaded"):
        build_causal(CausalSettings(architecture="causal", pretrained=str(tmp_path)), VOCABULARY)
    assert not (tmp_path / "ran").exists()


def test_absent_on_an_offline_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    qwen = CausalSettings(architecture="causal", pretrained="Qwen/Qwen2.5-0.5B")
    mt5 = MT5Settings(architecture="mt5", pretrained="google/mt5-base")
    for name, build in (
        ("facebook/mbart-large-cc25", lambda name: build_mbart(LanguageModelSettings(pretrained=name), VOCABULARY)),
        ("google/mt5-base", lambda _: build_mt5(mt5, VOCABULARY)),
        ("Qwen/Qwen2.5-0.5B", lambda _: build_causal(qwen, VOCABULARY)),
    ):
        with pytest.raises(InputError) as raised:
            build(name)
        for wanted in (name, "config.json", "model.safetensors", "offline", "local folder"):
            assert wanted in str(raised.value)
        assert "\n" not in str(raised.value)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    mbart(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.safetensors of a MBartForConditionalGeneration"):
        build_mbart(LanguageModelSettings(pretrained=str(tmp_path)), VOCABULARY)
