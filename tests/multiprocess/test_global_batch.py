"""One global batch on two and three gloo ranks gives what one process gives: batch norm, losses, every gradient.

Started as a script, this file is one rank: it computes the single-process result, joins the group, computes its own
share and compares. The engine's part of the convention (loss = W * sum / global count, gradients averaged over the
ranks) is written out here by hand; tests of the engine prove it through DeepSpeed.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sltscale.config import (
    C2RLSettings,
    ResNetSettings,
    SentenceEncoderSettings,
    TransformerSettings,
    VisualSettings,
)
from sltscale.engine.signals import leave
from sltscale.methods.base import Method, Vocabulary, build_method
from sltscale.models.layers import GlobalBatchNorm
from sltscale.structures import Ragged, TextBatch, VideoBatch

TIME_LIMIT = 600  # seconds


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(ranks), str(tmp_path / "rendezvous")]
    processes = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output}"


def close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    limit = tolerance * max(1.0, expected.abs().max().item())
    difference = (found - expected).abs().max().item()
    assert difference <= limit, f"{name}: off by {difference}, allowed {limit}"


def mean_over_ranks(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def share(items: int) -> slice:
    """Uneven shares of ``items``: rank r of W holds about r + 1 parts."""
    world, rank = dist.get_world_size(), dist.get_rank()
    parts = world * (world + 1) // 2
    bounds = [items * (r * (r + 1) // 2) // parts for r in range(world + 1)]
    return slice(bounds[rank], bounds[rank + 1])


def norm_step(norm: nn.Module, x: Tensor, factors: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    (scale * (y * factors).sum()).backward()
    assert x.grad is not None
    return y.detach(), x.grad


def prepare_batch_norm() -> Callable[[], None]:
    cases = []
    for shape in ((23, 5), (11, 5, 3, 4)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            torch.manual_seed(0)
            single = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5).to(dtype)
            nn.init.normal_(single.weight)
            ours = GlobalBatchNorm(5).to(dtype)
            ours.load_state_dict(single.state_dict())
            x, factors = torch.randn(shape, dtype=dtype) * 2 + 30, torch.randn(shape, dtype=dtype)
            x[: shape[0] // 3] -= 20  # ranks' means differ
            if len(shape) == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            cases.append((single, ours, x, factors, norm_step(single, x, factors, 1.0), tolerance))

    def compare() -> None:
        world = dist.get_world_size()
        for single, ours, x, factors, (y, x_gradient), tolerance in cases:
            own = share(len(x))
            # the convention: each rank back-propagates W times its part of the global sum
            found, found_gradient = norm_step(ours, x[own], factors[own], float(world))
            close(found, y[own], tolerance, "output")
            close(found_gradient / world, x_gradient[own], tolerance, "input gradient")
            for name, parameter in single.named_parameters():
                close(mean_over_ranks(ours.get_parameter(name).grad), parameter.grad, tolerance, f"{name} gradient")
            for name, buffer in single.named_buffers():
                close(ours.get_buffer(name).to(buffer), buffer, tolerance, name)

    return compare


def tiny_method(mix: str, dtype: torch.dtype, duplicates: str) -> Method:
    blocks = TransformerSettings(layers=1, width=24, heads=4, feed_forward=32, dropout=0.0, max_positions=32)
    frames = ResNetSettings(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    settings = C2RLSettings(
        name="c2rl",
        visual=VisualSettings(frames=frames, transformer=blocks),
        text_encoder=SentenceEncoderSettings(**blocks.model_dump()),
        text_decoder=blocks,
        alpha=0.7,
        beta=1.3,
        mix=mix,
        duplicates=duplicates,
        mask_inner=mix == "sum2",  # CiCo's own loss comes with its own, unmasked softmax
    )
    torch.manual_seed(0)
    return build_method(settings, Vocabulary(40, 1, 2)).to(dtype)


def part_of_batch(own: slice) -> tuple[VideoBatch, TextBatch]:
    """Seven clips and sentences of different lengths, cut to ``own`` and trimmed to its longest sentence."""
    torch.manual_seed(1)
    clips = [torch.randint(0, 256, (length, 48, 32), dtype=torch.uint8) for length in (4, 1, 6, 3, 2, 5, 2)][own]
    lengths = torch.tensor([7, 3, 5, 4, 8, 3, 6])
    mask = torch.arange(8)[None] < lengths[:, None]
    ids = torch.where(mask, torch.randint(3, 40, (7, 8)), 1)[own]
    longest = int(lengths[own].max())
    names = [str(i) for i in range(7)][own]
    said = ["a", "b", "c", "a", "b", "d", "a"][own]  # some of them on other ranks too
    text = TextBatch(ids[:, :longest], mask[own][:, :longest].long())
    return VideoBatch(names, Ragged.from_list(clips), said, ["de"] * len(clips)), text


def prepare_c2rl() -> Callable[[], None]:
    references = []
    for mix, dtype, tolerance, duplicates in (
        ("sum2", torch.float64, 1e-11, "negatives"),
        ("sum2", torch.float32, 1e-5, "negatives"),
        ("cico4", torch.float64, 1e-11, "negatives"),
        ("sum2", torch.float64, 1e-11, "positives"),
    ):
        method = tiny_method(mix, dtype, duplicates)
        losses = method(*part_of_batch(slice(None)))
        values = {part: loss.loss_sum / loss.count for part, loss in losses.items()}
        sum(method.weights[part] * value for part, value in values.items()).backward()
        references.append((mix, dtype, tolerance, duplicates, method, values))

    def compare() -> None:
        world = dist.get_world_size()
        exact = [case for case in references if case[:2] == ("sum2", torch.float64)]
        negatives, positives = (float(values["contrastive"]) for *_, values in exact)
        assert negatives != positives
        for mix, dtype, tolerance, duplicates, single, values in references:
            method = tiny_method(mix, dtype, duplicates)
            losses = method(*part_of_batch(share(7)))
            total: Tensor | float = 0.0
            for part, loss in losses.items():
                count = world * mean_over_ranks(loss.count.to(dtype))
                close(world * mean_over_ranks(loss.loss_sum.detach()) / count, values[part], tolerance, part)
                total = total + world * method.weights[part] * loss.loss_sum / count
            total.backward()
            for name, parameter in single.named_parameters():
                close(mean_over_ranks(method.get_parameter(name).grad), parameter.grad, tolerance, f"{name} gradient")
            for name, buffer in single.named_buffers():
                close(method.get_buffer(name).double(), buffer.double(), tolerance, name)

    return compare


if __name__ == "__main__":
    ranks, rendezvous, own_rank = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    comparisons = [prepare_batch_norm(), prepare_c2rl()]  # one process so far
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=own_rank, world_size=ranks)
    for compare in comparisons:
        compare()
    dist.barrier()
    leave(0)
