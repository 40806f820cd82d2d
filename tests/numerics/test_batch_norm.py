"""GlobalBatchNorm on one process against torch's batch norm; two and three ranks are in tests/multiprocess."""

import pytest
import torch
from torch import Tensor, nn

from sltscale.models.layers import GlobalBatchNorm, LogitScale, _TrainingBatchNorm, use_global_batch_norm

SHAPES = [(17, 6), (5, 6, 4, 3)]


def pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[nn.Module, GlobalBatchNorm, Tensor]:
    torch.manual_seed(0)
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1]).to(dtype)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = GlobalBatchNorm(shape[1]).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours, torch.randn(shape, dtype=dtype) * 3 + 50  # a mean far from 0 shows cancellation


def step(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, **dict(norm.named_buffers())}


def through_own_function(norm: GlobalBatchNorm, x: Tensor) -> Tensor:
    """What ``norm`` does in training with several ranks."""
    weight, bias = norm.weight.to(norm.running_mean.dtype), norm.bias.to(norm.running_mean.dtype)
    return _TrainingBatchNorm.apply(x, weight, bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [False, True], ids=["module", "function"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_torch(
    shape: tuple[int, ...], own: bool, dtype: torch.dtype, tolerance: float, channels_last: bool, monkeypatch
) -> None:
    theirs, ours, x = pair(shape, dtype)
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if own:
        monkeypatch.setattr(ours, "forward", lambda x: through_own_function(ours, x))
    for _ in range(2):
        expected, found = step(theirs, x), step(ours, x)
        for name, value in expected.items():
            if name == "num_batches_tracked":
                assert own or found[name] == value
                continue
            scale = max(1.0, value.abs().max().item())
            assert (found[name] - value).abs().max().item() <= tolerance * scale, name
    theirs.eval()
    ours.eval()
    monkeypatch.undo()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=tolerance * 100)


def test_gradcheck_of_the_own_function() -> None:
    _, norm, x = pair((5, 3), torch.float64)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    assert torch.autograd.gradcheck(
        lambda x, w, b: _TrainingBatchNorm.apply(x, w, b, mean, variance, 0.1, 1e-5),
        ((x - 50).requires_grad_(), norm.weight, norm.bias),
    )


def test_a_single_item_gives_the_bias_and_finite_statistics() -> None:
    torch.manual_seed(0)
    norm = GlobalBatchNorm(4).double()  # the item's distance from its mean counts 1 / sqrt(eps) times
    nn.init.normal_(norm.bias)
    x = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    torch.testing.assert_close(y, norm.bias[None])
    torch.testing.assert_close(norm.running_var, torch.full((4,), 0.9, dtype=norm.running_var.dtype))
    assert torch.isfinite(x.grad).all()


def test_statistics_stay_float32_under_bfloat16() -> None:
    torch.manual_seed(0)
    wide = GlobalBatchNorm(6)
    x = torch.randn(400, 6) * 3 + 5
    narrow = GlobalBatchNorm(6).bfloat16()
    assert narrow.weight.dtype == torch.bfloat16 and narrow.running_mean.dtype == torch.float32
    for function in (narrow, lambda x: through_own_function(narrow, x)):
        wide.reset_running_stats()
        narrow.reset_running_stats()
        expected = wide(x.bfloat16().float())
        y = function(x.bfloat16())
        assert y.dtype == torch.bfloat16 and narrow.running_var.dtype == torch.float32
        torch.testing.assert_close(y.float(), expected, rtol=0.01, atol=0.02)
        torch.testing.assert_close(narrow.running_mean, wide.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(narrow.running_var, wide.running_var, rtol=1e-5, atol=1e-6)


def test_replacement_keeps_names_values_and_results() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)))
    x = torch.randn(6, 3, 4, 4)
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    model.load_state_dict(before)
    use_global_batch_norm(model)
    assert sum(isinstance(m, GlobalBatchNorm) for m in model.modules()) == 2
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_logit_scale_is_capped_and_comes_back() -> None:
    scale = LogitScale(100.0)
    assert scale.theta.shape == (1,)
    assert scale().item() == pytest.approx(1 / 0.07, rel=1e-6)
    scale.theta.data.fill_(9.0)
    assert scale().item() == pytest.approx(100.0, rel=1e-5)
    for loss_sign, held in ((-1, True), (1, False)):  # a loss that wants it larger; one that wants it smaller
        scale.theta.grad = None
        (loss_sign * scale()).sum().backward()
        assert (scale.theta.grad.item() == 0) is held
