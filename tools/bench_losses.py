"""Contrastive losses in chunks against their dense form: python tools/bench_losses.py [--loss clip clcl] [--dense 512].

For four batch sizes each: seconds of forward and backward pass, peak memory beyond the features themselves (GPU memory
where there is a GPU, else resident memory), and the largest difference of loss and gradients from the dense form,
relative to the largest element. Features are random, float32; a part of the tokens of CLCL is padding. The dense form
is left out where one of its tensors would be larger than --dense MiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measuring import peak_mib, seconds
from torch import Tensor

from sltscale.losses.contrastive import clcl_loss, clcl_pair_loss, clcl_similarity, clip_loss

SIZES = {"clip": (1024, 2048, 4096, 8192), "clcl": (64, 128, 256, 512)}
WIDTH, VIDEO_TOKENS, TEXT_TOKENS = {"clip": 512, "clcl": 256}, 32, 24
Loss = Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--dense", type=int, default=512, metavar="MIB")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    losses: dict[str, list[Loss]] = {"clip": [_clip, _dense_clip], "clcl": [_clcl, _dense_clcl]}
    draw = {"clip": _pooled, "clcl": _tokens}

    def forms(name: str, batch: int) -> list[Loss]:
        tokens = VIDEO_TOKENS * TEXT_TOKENS if name == "clcl" else 1
        return losses[name][: 2 if batch**2 * tokens * 4 <= arguments.dense * 2**20 else 1]

    peaks = {}
    for name in arguments.loss:
        for form in losses[name]:
            _gradients(form, draw[name](SIZES[name][0]))  # warms up
        for batch in SIZES[name]:
            inputs = draw[name](batch)
            peaks[name, batch] = [peak_mib(partial(_gradients, form, inputs)) for form in forms(name, batch)]
    for name in arguments.loss:
        print(
            f"{name}, width {WIDTH[name]}; forward and backward; dense where a [batch, batch] tensor is not too large"
        )
        print(f"{'batch':>7}{'chunks s':>12}{'MiB':>8}{'dense s':>12}{'MiB':>8}{'difference':>12}")
        for batch in SIZES[name]:
            inputs = draw[name](batch)
            found: list[list[Tensor]] = []
            line = f"{batch:7}"
            for form, peak in zip(forms(name, batch), peaks[name, batch], strict=True):
                line += f"{seconds(partial(_append_gradients, found, form, inputs)):12.2f}{peak:8.0f}"
            print(f"{line}{_difference(*found):12.1e}" if len(found) == 2 else line, flush=True)


def _append_gradients(found: list[list[Tensor]], loss: Loss, inputs: list[Tensor]) -> None:
    found.append(_gradients(loss, inputs))


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def _gradients(loss: Loss, inputs: list[Tensor]) -> list[Tensor]:
    """The loss, and its gradient with respect to every input that has one."""
    value = loss(*inputs)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, trained)]


def _random(*shape: int) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).to(device).requires_grad_()


def _scale(like: Tensor) -> Tensor:
    return torch.tensor(1 / 0.07, device=like.device, requires_grad=True)


def _pooled(batch: int) -> list[Tensor]:
    video = _random(batch, WIDTH["clip"])
    text = (video + 4 * _random(batch, WIDTH["clip"]).roll(1, 0)).detach().requires_grad_()  # partners are alike
    return [video, text, _scale(video)]


def _tokens(batch: int) -> list[Tensor]:
    video, text = _random(batch, VIDEO_TOKENS, WIDTH["clcl"]), _random(batch, TEXT_TOKENS, WIDTH["clcl"])
    generator = torch.Generator().manual_seed(0)
    masks = [
        torch.arange(tokens)[None] < torch.randint(tokens // 4, tokens + 1, (batch, 1), generator=generator)
        for tokens in (VIDEO_TOKENS, TEXT_TOKENS)
    ]
    return [video, text, *(mask.to(video.device) for mask in masks), _scale(video)]


def _clip(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return clip_loss(video, text, scale).loss_sum / len(video)


def _dense_clip(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).T
    own = torch.arange(len(video), device=video.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _clcl(*inputs: Tensor) -> Tensor:
    return clcl_pair_loss(*inputs).loss_sum / len(inputs[0])


def _dense_clcl(*inputs: Tensor) -> Tensor:
    return clcl_loss(*clcl_similarity(*inputs)).loss_sum / len(inputs[0])


if __name__ == "__main__":
    main()
