"""transformers' models on packed attention against their own eager attention, forward and gradients, and decoding."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
)
from transformers.models.mbart.modeling_mbart import MBartDecoder, MBartEncoder

from sltscale.config import ActivationSettings
from sltscale.errors import InputError
from sltscale.methods.attention import set_attention
from sltscale.methods.base import Vocabulary, build_method
from sltscale.models.attention import BACKENDS, choose_backend
from sltscale.models.language_attention import OWN, PACKED, attend_packed
from sltscale.models.memory import checkpoint_blocks
from sltscale.recipe_files import load_recipe
from sltscale.structures import Ragged, TextBatch, VideoBatch

CPU = torch.device("cpu")
ANYWHERE = [name for name, backend in BACKENDS.items() if backend.kernel is None]
KERNELS = [name for name in BACKENDS if name not in ANYWHERE]
LENGTHS, LONGER = [1, 9, 4, 9, 6], [12, 3, 9, 7, 1]
WIDTH = 32
MBART: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "init_std": 0.2,
    "forced_eos_token_id": None,
}
CAUSAL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 2,
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def right(lengths: list[int]) -> Tensor:
    """Mask int64 [B, L] with padding on the right."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def left(lengths: list[int]) -> Tensor:
    return right(lengths).flip(1)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(lengths: list[int], seed: int = 2) -> Tensor:
    return torch.randint(4, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """A model of transformers and what it is given. valid: bool, where its output means something. dense: calls of
    transformers' sdpa that remain in a forward, of cross-attention."""

    build: Callable[[], Any]
    inputs: dict[str, Tensor]
    valid: Tensor
    dense: int = 0


def encoder() -> Case:
    inputs = {"inputs_embeds": random(5, 12, WIDTH), "attention_mask": right(LONGER)}
    return Case(lambda: MBartEncoder(MBartConfig(**MBART)), inputs, right(LONGER).bool())


def decoder(read: list[int], masked: bool = False) -> Case:
    """Under teacher forcing, where no mask is handed to it, or one is."""
    inputs = {
        "input_ids": tokens(LENGTHS),
        "encoder_hidden_states": random(len(read), max(read), WIDTH),
        "encoder_attention_mask": right(read),
    }
    inputs |= {"attention_mask": right(LENGTHS)} if masked else {}
    return Case(lambda: MBartDecoder(MBartConfig(**MBART)), inputs, right(LENGTHS).bool(), dense=2)


def mbart() -> Case:
    inputs = {
        "inputs_embeds": random(5, 12, WIDTH),
        "attention_mask": right(LONGER),
        "decoder_input_ids": tokens(LENGTHS),
    }
    return Case(lambda: MBartForConditionalGeneration(MBartConfig(**MBART)), inputs, right(LENGTHS).bool(), dense=2)


def causal(build: Callable[[], Any], mask: Tensor, dense: int = 0) -> Case:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"inputs_embeds": random(*mask.shape, WIDTH), "attention_mask": mask, "position_ids": positions}
    return Case(build, inputs, mask.bool(), dense)


def llama(mask: Tensor) -> Case:
    return causal(lambda: LlamaForCausalLM(LlamaConfig(**CAUSAL)), mask)


def gpt2() -> GPT2LMHeadModel:
    ends: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 2, "scale_attn_by_inverse_layer_idx": True}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=WIDTH, n_layer=2, n_head=4, **dropout, **ends))


def dino() -> Case:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    return Case(
        lambda: Dinov2Model(Dinov2Config(**sizes)), {"pixel_values": random(3, 3, 28, 28)}, torch.ones(3, 17) > 0
    )


CASES: dict[str, Callable[[], Case]] = {
    "mBART encoder": encoder,
    "mBART decoder": lambda: decoder(LONGER),
    "mBART decoder, padding named": lambda: decoder(LONGER, masked=True),
    "mBART decoder that reads as many steps as it writes": lambda: decoder([3, 9, 5, 2, 9], masked=True),
    "mBART": mbart,
    "Llama, padding on the left": lambda: llama(left(LENGTHS)),
    "Llama, padding on the right": lambda: llama(right(LENGTHS)),
    "Llama, no padding": lambda: llama(right([7, 7])),
    "Llama, a row of padding alone": lambda: llama(left([4, 0, 9])),
    "GPT-2, another scaling": lambda: causal(gpt2, left(LENGTHS)),
    "Mistral, a sliding window": lambda: causal(
        lambda: MistralForCausalLM(MistralConfig(sliding_window=3, **CAUSAL)), left(LENGTHS), dense=2
    ),
    "Mistral, a window wider than the rows": lambda: causal(
        lambda: MistralForCausalLM(MistralConfig(sliding_window=64, **CAUSAL)), left(LENGTHS), dense=2
    ),
    "DINOv2": dino,
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def twins(case: Case, backend: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The same model twice: on transformers' eager attention, and on ``backend``."""
    torch.manual_seed(0)
    model = case.build()
    packed = copy.deepcopy(model).to(device, dtype)
    assert attend_packed(packed, device, dtype, backend) == {backend: [""]}
    model.set_attn_implementation("eager")
    return model, packed


def output(model: Any, case: Case) -> Tensor:
    """[number of valid places, width or vocabulary]."""
    like = next(model.parameters())
    inputs = {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in case.inputs.items()
    }
    found = model(**inputs, **({} if isinstance(model, Dinov2Model) else {"use_cache": False}))
    padded: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return padded[case.valid.to(padded.device)]


def gradients(model: Any, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, gradient of a weighted sum of it for each parameter), the latter by name."""
    model.zero_grad()
    found = output(model, case)
    (found * random(*found.shape, seed=3).to(found.device, found.dtype)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@each_case
@pytest.mark.parametrize("backend", ANYWHERE)
def test_equals_eager_attention(backend: str, case: Callable[[], Case]) -> None:
    this = case()
    eager, packed = (gradients(model, this) for model in twins(this, backend))
    torch.testing.assert_close(packed[0], eager[0], rtol=1e-5, atol=1e-5)
    assert packed[1].keys() == eager[1].keys() and len(eager[1]) > 10
    for name, expected in eager[1].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(packed[1][name], expected, rtol=1e-5, atol=1e-5 * max(scale, 1.0), msg=name)


class _Dense(TorchFunctionMode):
    """Counts calls of torch's attention over padded rows."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@each_case
def test_what_goes_where(case: Callable[[], Case]) -> None:
    this = case()
    _, packed = twins(this, "reference")
    with _Dense() as dense:
        output(packed, this)
    assert dense.calls == this.dense


def test_what_is_in_padding_reaches_nobody() -> None:
    this = encoder()
    _, packed = twins(this, "sdpa")
    expected = output(packed, this)
    this.inputs["inputs_embeds"][~this.valid] = torch.nan
    assert torch.equal(output(packed, this), expected)


@pytest.mark.parametrize("offload", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(offload: bool) -> None:
    this = llama(left(LENGTHS))
    _, packed = twins(this, "sdpa")
    expected = gradients(packed, this)
    checkpoint_blocks(packed.model.layers, ActivationSettings(checkpoint_activations=True, offload_activations=offload))
    torch.testing.assert_close(gradients(packed, this), expected, rtol=0, atol=0)


def test_dropout_is_of_the_seed() -> None:
    this = llama(left(LENGTHS))
    this.build = lambda: LlamaForCausalLM(LlamaConfig(attention_dropout=0.5, **CAUSAL))
    _, packed = twins(this, "sdpa")

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return output(packed.train(), this)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.allclose(drawn(1), drawn(2))
    assert not torch.allclose(drawn(1), output(packed.eval(), this))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", [mbart, lambda: llama(left(LENGTHS))], ids=["mBART", "Llama"])
def test_decoding_writes_the_same(case: Callable[[], Case], beams: int) -> None:
    this = case()
    for given_in_training in ("decoder_input_ids", "position_ids"):
        this.inputs.pop(given_in_training, None)
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    eager, packed = (model.eval().generate(**this.inputs, **options).tolist() for model in twins(this, "sdpa"))
    assert packed == eager
    assert len({tuple(row) for row in eager}) > 1


@pytest.mark.parametrize(
    "name, language_id, expected",
    [
        ("demo", 39, "attention of visual.transformer.blocks, language_model by sdpa"),
        ("gfslt_slt_tiny", 39, "attention of language_model by sdpa"),
        ("llm_slt_tiny", 40, "attention of visual.transformer.blocks, language_model by sdpa"),
    ],
)
def test_a_recipe_sets_it(name: str, language_id: int, expected: str) -> None:
    recipe = load_recipe(name, ["--train.attention", "sdpa"])
    torch.manual_seed(0)
    method = build_method(recipe.method, Vocabulary(40, pad_id=1, eos_id=2, prompts=((7, 8, 9),))).eval()
    ids = tokens(LENGTHS)
    ids.scatter_(1, torch.tensor(LENGTHS)[:, None] - 1, language_id)
    text = TextBatch(ids.masked_fill(right(LENGTHS) == 0, 1), right(LENGTHS))
    frames = torch.randint(0, 256, (sum(LONGER), 48, 32), dtype=torch.uint8)
    names = [str(row) for row in range(len(LONGER))]
    clips = VideoBatch(names, Ragged.from_lengths(frames, LONGER), names, ["de"] * len(names))
    before = {part: loss.loss_sum for part, loss in method(clips, text).items()}
    assert set_attention(recipe, method, CPU, torch.float32) == [expected]
    layers: list[Any] = [layer for layer in method.modules() if hasattr(layer, "is_causal")]
    assert len(layers) > 2 and {layer.config._attn_implementation for layer in layers} == {PACKED}
    torch.testing.assert_close({part: loss.loss_sum for part, loss in method(clips, text).items()}, before)


def test_who_attends_by_what() -> None:
    sizes = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    method = nn.ModuleDict(
        {
            "visual": nn.Sequential(nn.Linear(2, 2), MBartEncoder(MBartConfig(**MBART))),
            "language_model": mbart().build(),
            "mt5": MT5ForConditionalGeneration(MT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1)),
            "bloom": BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)),
            "gemma2": Gemma2ForCausalLM(Gemma2Config(head_dim=8, num_key_value_heads=2, intermediate_size=8, **sizes)),
        }
    )
    left_out = ["mt5", "bloom", "gemma2"]
    before = {name: method[name].config._attn_implementation for name in left_out}
    everyone = ["visual.1", "language_model", *left_out]
    assert attend_packed(method, CPU, torch.float32) == {OWN: everyone}
    assert attend_packed(method, CPU, torch.bfloat16) == {OWN: everyone}
    assert attend_packed(method, torch.device("cuda"), torch.float32) == {OWN: everyone}
    assert attend_packed(method, CPU, torch.float32, "sdpa") == {"sdpa": everyone[:2], OWN: left_out}
    assert {name: method[name].config._attn_implementation for name in left_out} == before


def test_what_cannot_be_had_is_said_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^attention backend torch_varlen needs a CUDA device, found cpu: run on one"):
        attend_packed(mbart().build(), CPU, torch.float32, "torch_varlen")
    narrow = MBartEncoder(MBartConfig(**MBART | {"encoder_attention_heads": 8}))
    with pytest.raises(InputError, match=r"^attention backend torch_varlen needs heads of a width .* found 4: change"):
        attend_packed(narrow, torch.device("cuda"), torch.bfloat16, "torch_varlen")


def test_scores_that_are_capped_are_refused_as_by_sdpa() -> None:
    """Not taken for others, should transformers ever run such a model on sdpa."""
    config = Gemma2Config(head_dim=8, sliding_window=4, **CAUSAL | {"pad_token_id": 1})
    model = Gemma2ForCausalLM(config)
    model.set_attn_implementation(PACKED)
    with pytest.raises(ValueError, match="softcap"):
        model(input_ids=tokens([3, 2]))


def check_bfloat16(case: Case, backend: str, device: torch.device) -> None:
    """Output and gradients point where those of eager attention in float32 do, from the same weights."""
    _, packed = twins(case, backend, device, torch.bfloat16)
    exact = copy.deepcopy(packed).float()
    exact.set_attn_implementation("eager")
    found, wanted = gradients(packed, case), gradients(exact, case)
    everything = [
        torch.cat([one[0].flatten().double(), *(g.flatten().double() for g in one[1].values())])
        for one in (found, wanted)
    ]
    assert torch.cosine_similarity(*everything, dim=0) > 0.9998


@each_case
def test_bfloat16(case: Callable[[], Case]) -> None:
    check_bfloat16(case(), "sdpa", CPU)


@pytest.mark.gpu
@needs_cuda
@each_case
@pytest.mark.parametrize("backend", [*KERNELS, "sdpa"])
def test_bfloat16_on_a_gpu(backend: str, case: Callable[[], Case]) -> None:
    device = torch.device("cuda")
    try:
        choose_backend(device, torch.bfloat16, 8, backend=backend)
    except InputError as reason:
        pytest.skip(str(reason))
    check_bfloat16(case(), backend, device)


@pytest.mark.gpu
@needs_cuda
def test_a_gpu_takes_the_first_kernel() -> None:
    device = torch.device("cuda")
    first = choose_backend(device, torch.bfloat16, 16)
    if BACKENDS[first].kernel is None:
        pytest.skip("no kernel for packed sequences is installed")
    assert attend_packed(mbart().build(), device, torch.bfloat16) == {first: [""]}
