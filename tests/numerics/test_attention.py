"""Every attention backend against the loop in the open, forward and gradients, and the loop against a table."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sltscale.errors import InputError
from sltscale.models.attention import BACKENDS, choose_backend, packed_attention
from sltscale.structures import Ragged

CPU = torch.device("cpu")
ANYWHERE = [name for name, backend in BACKENDS.items() if backend.kernel is None]
KERNELS = [name for name in BACKENDS if name not in ANYWHERE]
EVERY_LENGTH = [1 + length for length in torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()]
PACKS = {
    "one step": [1],
    "one clip": [300],
    "ragged": [1, 300, 7, 64, 1, 33, 2, 3, 4, 32],
    "empty clips": [0, 5, 0, 0, 12, 0],
    "alike": [9] * 20,
    "every length": EVERY_LENGTH,
}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pack(lengths: list[int], heads: int, width: int, seed: int = 0) -> tuple[Ragged, Tensor]:
    """(query, key and value as Ragged [N, 3, H, D], a weight [N, H, D] for each output)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), 3, heads, width, generator=generator)
    return Ragged.from_lengths(values, lengths), torch.randn(values[:, 0].shape, generator=generator)


def attend(sequence: Ragged, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(output, gradient of its weighted sum with respect to query, key and value)."""
    values = sequence.values.detach().requires_grad_()
    output = packed_attention(*values.unbind(1), sequence.cu_seqlens, sequence.max_seqlen, **options)
    (gradient,) = torch.autograd.grad((output * weights).sum(), values)
    return output.detach(), gradient


@pytest.mark.parametrize("window", [None, 1, 7, 101])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("backend", [name for name in ANYWHERE if name != "reference"])
def test_equals_the_reference(backend: str, lengths: list[int], causal: bool, window: int | None) -> None:
    sequence, weights = pack(lengths, heads=2, width=8)
    found = attend(sequence, weights, causal=causal, window=window, backend=backend)
    expected = attend(sequence, weights, causal=causal, window=window, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def sees(left: float, right: float) -> list[list[int]]:
    """Which of the steps of packed clips of 6, 1 and 3 see which."""
    clips = [0] * 6 + [1] + [2] * 3
    return [[int(clips[i] == clips[j] and -left <= j - i <= right) for j in range(10)] for i in range(10)]


@pytest.mark.parametrize(
    "options, left, right",
    [
        ({}, 10, 10),
        ({"causal": True}, 10, 0),
        ({"window": 7}, 3, 3),
        ({"window": 7, "causal": True}, 3, 0),
        ({"window": 3}, 1, 1),
    ],
)
@pytest.mark.parametrize("backend", ANYWHERE)
def test_who_sees_whom(backend: str, options: dict[str, Any], left: int, right: int) -> None:
    query, key = torch.randn(2, 10, 1, 10, generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, 6, 7, 10], dtype=torch.int32)
    weights = packed_attention(query, key, torch.eye(10)[:, None], cu_seqlens, 6, backend=backend, **options)[:, 0]
    assert (weights > 0).int().tolist() == sees(left, right)
    torch.testing.assert_close(weights.sum(1), torch.ones(10))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("backend", ANYWHERE)
def test_dropout_zeroes_weights_and_scales_the_rest(backend: str, window: int | None) -> None:
    query, key = torch.randn(2, 60, 1, 60, generator=torch.Generator().manual_seed(1))
    cu_seqlens = torch.tensor([0, 20, 60], dtype=torch.int32)

    def weights(dropout: float) -> Tensor:
        identity = torch.eye(60)[:, None]
        return packed_attention(query, key, identity, cu_seqlens, 40, window=window, dropout=dropout, backend=backend)

    torch.manual_seed(0)
    whole, dropped = weights(0.0), weights(0.5)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert 0.4 < kept[whole > 0].float().mean() < 0.6


class _Largest(TorchDispatchMode):
    """The most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_memory_is_linear_in_the_pack(window: int | None, causal: bool) -> None:
    def largest(clips: int) -> int:
        sequence, weights = pack([50, 30] * clips, heads=2, width=8)
        with _Largest() as mode:
            attend(sequence, weights, causal=causal, window=window, backend="sdpa")
        return mode.elements

    assert largest(64) < 2.1 * largest(32)


def test_an_empty_pack_has_gradients() -> None:
    sequence, weights = pack([], heads=2, width=8)
    output, gradient = attend(sequence, weights)
    assert output.shape == (0, 2, 8) and gradient.shape == (0, 3, 2, 8)


def test_without_a_gpu_it_is_sdpa() -> None:
    assert choose_backend(CPU, torch.float32, 64) == "sdpa"
    assert choose_backend(CPU, torch.bfloat16, 64, window=7, dropout=0.1) == "sdpa"
    assert choose_backend(CPU, torch.float32, 64, backend="reference") == "reference"


@pytest.mark.parametrize(
    "backend, message",
    [
        ("flash", "attention backend 'flash' is unknown; expected one of flash_attn, "),
        ("torch_varlen", "torch_varlen needs a CUDA device, found cpu: run on one, or take one of sdpa, reference"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(backend: str, message: str) -> None:
    for ask in (
        lambda: choose_backend(CPU, torch.float32, 64, backend=backend),
        lambda: attend(*pack([3], heads=2, width=8), backend=backend),
    ):
        with pytest.raises(InputError) as error:
            ask()
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("backend", [name for name in KERNELS if name != "torch_varlen"])
def test_what_is_not_installed_names_its_extra(backend: str) -> None:
    if importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is installed")
    with pytest.raises(
        InputError, match=f"^attention backend {backend} is not installed: pip install 'sltscale.cuda.'"
    ):
        choose_backend(CPU, torch.float32, 64, backend=backend)


@pytest.mark.parametrize("window", [0, -7, 6])
def test_a_window_is_odd(window: int) -> None:
    with pytest.raises(ValueError, match=f"found {window}"):
        attend(*pack([9], heads=2, width=8), window=window)


def check_bfloat16(backend: str, device: str, lengths: list[int], **options: Any) -> None:
    """Output and each gradient point where those of the reference in float32 do, from the same bfloat16 inputs."""
    sequence, weights = pack(lengths, heads=4, width=64)
    rounded = Ragged(sequence.values.bfloat16(), sequence.cu_seqlens, sequence.max_seqlen).to(device)
    exact = Ragged(rounded.values.float(), rounded.cu_seqlens, rounded.max_seqlen)
    weights = weights.bfloat16().to(device)
    output, gradient = attend(rounded, weights, backend=backend, **options)
    expected, expected_gradient = attend(exact, weights.float(), backend="reference", **options)
    pairs = [(output, expected), *zip(gradient.unbind(1), expected_gradient.unbind(1), strict=True)]
    for found, wanted in pairs:
        if wanted.abs().max() > 1e-3:  # query and key of single steps have no gradient
            cosine = torch.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
            assert cosine > 0.9999


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16(causal: bool, window: int | None) -> None:
    check_bfloat16("sdpa", "cpu", PACKS["ragged"], causal=causal, window=window)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("window", [None, 7, 101])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [PACKS["one step"], PACKS["ragged"], PACKS["empty clips"], EVERY_LENGTH])
@pytest.mark.parametrize("backend", [*KERNELS, "sdpa"])
def test_bfloat16_on_a_gpu(backend: str, lengths: list[int], causal: bool, window: int | None) -> None:
    options = {"causal": causal, "window": window}
    try:
        choose_backend(torch.device("cuda"), torch.bfloat16, 64, backend=backend, **options)
    except InputError as reason:
        pytest.skip(str(reason))
    check_bfloat16(backend, "cuda", lengths, **options)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_float32_on_a_gpu(causal: bool, window: int | None) -> None:
    sequence, weights = (x.to("cuda") for x in pack(PACKS["ragged"], heads=4, width=64))
    found = attend(sequence, weights, causal=causal, window=window, backend="sdpa")
    expected = attend(sequence, weights, causal=causal, window=window, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
