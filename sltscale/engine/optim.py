"""Parameter groups by rule, and one optimizer whose groups have their own algorithm and update period."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sltscale.config import GroupSettings, OptimSettings
from sltscale.errors import InputError


def _build_torch_optimizer(name: str) -> torch.optim.Optimizer:
    """torch's optimizer of that name, holding nothing."""
    nothing = [torch.zeros(0)]
    if name == "sgd":
        return torch.optim.SGD(nothing, lr=0.0, momentum=0.9, nesterov=True)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](nothing)


class GroupedOptimizer(torch.optim.Optimizer):
    """torch's SGD (momentum 0.9, Nesterov), Adam and AdamW side by side, one algorithm for each group.

    A group's "algorithm" names it, its other entries are that algorithm's; a step passes over groups whose "due" is
    false, which keep weights and state. A step is torch's own, so nothing differs from separate optimizers. What lies
    in a group may change between steps, as it does under ZeRO.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._algorithms = {name: _build_torch_optimizer(name) for name in {group["algorithm"] for group in groups}}
        super().__init__([{**self._algorithms[group["algorithm"]].defaults, **group} for group in groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            if group["due"]:
                algorithm = self._algorithms[group["algorithm"]]
                algorithm.param_groups, algorithm.state = [group], self.state
                algorithm.step()


def build_optimizer(model: nn.Module, settings: OptimSettings) -> GroupedOptimizer:
    """The optimizer of the recipe's rules, for a model as it is before DeepSpeed takes it; freezes what they freeze.

    Raises InputError for a rule that no parameter belongs to, or if nothing is left to train.
    """
    freeze(model, settings)
    optimizer = GroupedOptimizer(parameter_groups(model, settings))
    for group in optimizer.param_groups:
        if group["period"] > 1:
            for parameter in group["params"]:
                parameter.register_hook(_drop_unless_due(group))
    return optimizer


def _drop_unless_due(group: dict[str, Any]) -> Callable[[Tensor], Tensor | None]:
    """Gradient hook: what is not used must not count in the norm that clipping looks at, nor be found not finite."""
    return lambda gradient: None if group["due"] else torch.zeros_like(gradient)


def freeze(model: nn.Module, settings: OptimSettings) -> None:
    """Take the parameters of frozen rules out of training."""
    for name, parameter in model.named_parameters():
        rule = _rule_of(name, parameter, settings)
        if rule is not None and settings.groups[rule].frozen:
            parameter.requires_grad_(False)


def evaluate_frozen(model: nn.Module) -> None:
    """Put modules that have parameters, none of them trained, into evaluation mode: no dropout, statistics as loaded.

    To be called after ``model.train()``.
    """
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Groups of the trained parameters: one per (rule, decays or not), each with its name and all that holds for it.

    A parameter belongs to the first of ``settings.groups`` that it matches, or to "all". 1-D parameters (biases, norms,
    the logit scale) are spared from weight decay, as in timm's optimizer factory, unless a rule is for them only and
    gives one. Raises InputError for a rule that no parameter belongs to, or if nothing is trained.
    """
    members: dict[tuple[int | None, bool], list[nn.Parameter]] = {}
    idle = set(range(len(settings.groups)))
    for name, parameter in model.named_parameters():
        rule = _rule_of(name, parameter, settings)
        if rule is not None and (parameter.requires_grad or settings.groups[rule].frozen):
            idle.discard(rule)
        if parameter.requires_grad:
            members.setdefault((rule, _decays(parameter, rule, settings)), []).append(parameter)
    if idle:
        parts = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        raise InputError(
            f"optim.groups names {', '.join(_title(settings.groups[rule]) for rule in sorted(idle))}, which no trained "
            f"parameter belongs to that no earlier rule takes; the model's parts: {', '.join(parts)}"
        )
    if not members:
        raise InputError("optim.groups freezes all parameters; leave some to train")
    return [_group(rule, decays, parameters, settings) for (rule, decays), parameters in members.items()]


def _group(rule: int | None, decays: bool, parameters: list[nn.Parameter], settings: OptimSettings) -> dict[str, Any]:
    own = settings if rule is None else settings.of_group(settings.groups[rule])
    title = "all" if rule is None else _title(settings.groups[rule])
    group = {
        "name": f"{title}/{'decay' if decays else 'no_decay'}",
        "params": parameters,
        "rule": rule,
        "algorithm": own.name,
        "peak_lr": own.lr,
        "lr": own.lr,
        "weight_decay": own.weight_decay if decays else 0.0,
        "period": 1 if rule is None else settings.groups[rule].period,
        "due": True,
    }
    return group if own.name == "sgd" else {**group, "betas": own.betas}


def _decays(parameter: nn.Parameter, rule: int | None, settings: OptimSettings) -> bool:
    if rule is None:
        return settings.weight_decay > 0 and parameter.dim() > 1
    group = settings.groups[rule]
    asked_for = group.only == "norm_bias" and group.weight_decay is not None
    return settings.of_group(group).weight_decay > 0 and (parameter.dim() > 1 or asked_for)


def _rule_of(name: str, parameter: nn.Parameter, settings: OptimSettings) -> int | None:
    for rule, group in enumerate(settings.groups):
        lies_in_part = any(fnmatchcase(name, pattern) for pattern in (group.part, f"{group.part}.*"))
        is_meant = {
            None: True,
            "lora": any(piece.startswith("lora_") for piece in name.split(".")),
            "norm_bias": parameter.dim() <= 1,
        }[group.only]
        if lies_in_part and is_meant:
            return rule
    return None


def _title(group: GroupSettings) -> str:
    return group.part if group.only is None else f"{group.part} ({group.only})"
