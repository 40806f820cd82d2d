"""Parameter groups by rule, schedules as functions of the step, groups that are not due, frozen parts, offload."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sltscale.config import OptimSettings
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.engine.deepspeed_json import read_deepspeed_json
from sltscale.engine.optim import build_optimizer, evaluate_frozen
from sltscale.engine.schedules import Progress, set_learning_rate
from sltscale.errors import InputError


def settings(*groups: dict[str, Any], **values: Any) -> OptimSettings:
    return OptimSettings.model_validate({"name": "sgd", "lr": 0.1, **values, "groups": list(groups)})


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = {"tower": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), "head": nn.Linear(4, 2)}
    return nn.ModuleDict(layers)


def members(network: nn.Module, rules: OptimSettings) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    optimizer = build_optimizer(network, rules)
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}


def test_without_rules_only_decay_tells_groups_apart() -> None:
    vectors = ["tower.0.bias", "tower.1.weight", "tower.1.bias", "head.bias"]
    matrices = ["tower.0.weight", "head.weight"]
    assert members(model(), settings(weight_decay=0.1)) == {"all/decay": matrices, "all/no_decay": vectors}
    assert [len(names) for names in members(model(), settings()).values()] == [6]


def test_the_first_rule_that_matches_wins() -> None:
    rules = settings({"part": "*.0", "lr": 1}, {"part": "tower", "lr": 2}, {"part": "*", "lr": 3})
    assert members(model(), rules) == {
        "*.0/no_decay": ["tower.0.weight", "tower.0.bias"],
        "tower/no_decay": ["tower.1.weight", "tower.1.bias"],
        "*/no_decay": ["head.weight", "head.bias"],
    }
    # a name is a part of a path, not of a word
    with pytest.raises(InputError, match=r"optim\.groups names tow, hea.*the model's parts: head, tower"):
        build_optimizer(model(), settings({"part": "tow"}, {"part": "hea"}))


def test_rules_for_norms_and_biases_and_for_lora() -> None:
    network = model()
    config = peft.LoraConfig(r=2, target_modules=["head"])
    peft.inject_adapter_in_model(config, network)
    network.requires_grad_(True)
    rules = settings(
        {"part": "head.base_layer", "frozen": True},
        {"part": "*", "only": "lora", "name": "adam", "lr": 0.5, "weight_decay": 0.0},
        {"part": "tower", "only": "norm_bias", "weight_decay": 0.3},
        weight_decay=0.2,
    )
    assert members(network, rules) == {
        "all/decay": ["tower.0.weight"],
        "tower (norm_bias)/decay": ["tower.0.bias", "tower.1.weight", "tower.1.bias"],
        "* (lora)/no_decay": ["head.lora_A.default.weight", "head.lora_B.default.weight"],
    }
    assert not network["head"].base_layer.weight.requires_grad
    groups = {group["name"]: group for group in build_optimizer(network, rules).param_groups}
    assert [group["weight_decay"] for group in groups.values()] == [0.2, 0.3, 0.0]
    assert [group["algorithm"] for group in groups.values()] == ["sgd", "sgd", "adam"]
    assert groups["* (lora)/no_decay"]["betas"] == (0.9, 0.999) and groups["all/decay"]["nesterov"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"part": "*", "only": "lora"}], r"names \* \(lora\), which no trained parameter"),
        (
            [{"part": "tower"}, {"part": "tower.0"}],
            "names tower.0, which no trained .* no earlier rule takes",
        ),
        ([{"part": "*", "frozen": True}], "freezes all parameters"),
    ],
)
def test_rules_without_effect_are_refused(groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_optimizer(model(), settings(*groups))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup_steps": 3, "schedule": "one_cycle"}, "warmup_steps 3 does not go with one_cycle; set it to 0"),
        ({"warmup_steps": 3, "groups": [{"part": "a", "schedule": "cosine_epoch"}]}, "a: warmup_steps 3 does not go"),
        ({"min_lr": 0.2}, "min_lr 0.2 is above lr 0.1"),
        ({"min_lr": 0.01, "groups": [{"part": "a", "lr": 0.001}]}, "a: min_lr 0.01 is above lr 0.001"),
        ({"groups": [{"part": "a", "frozen": True, "lr": 1, "period": 2}]}, "a is frozen and sets lr, period"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OptimSettings.model_validate({"name": "sgd", "lr": 0.1, **values})


def rates(rules: OptimSettings, plan: Plan, epochs: int) -> list[dict[str, Any]]:
    """What the last group has at every step."""
    optimizer = build_optimizer(model(), rules)
    found = []
    for step in range(plan.steps(epochs)):
        main = set_learning_rate(optimizer, Progress.of(plan, step, epochs), rules)
        assert main == optimizer.param_groups[0]["lr"]
        found.append({key: value for key, value in optimizer.param_groups[-1].items() if key != "params"})
    return found


PLAN = Plan([1] * 20, 0, BatchRule(clips=4))  # 5 steps an epoch
HEAD = {"part": "head", "lr": 0.02}


def test_each_group_has_its_own_schedule() -> None:
    rules = settings({**HEAD, "schedule": "constant", "warmup_steps": 0}, warmup_steps=4)
    assert [step["lr"] for step in rates(rules, PLAN, 2)] == [0.02] * 10
    rules = settings({**HEAD, "min_lr": 0.01}, warmup_steps=4)
    found = [step["lr"] for step in rates(rules, PLAN, 2)]
    expected = [0.005, 0.01, 0.015, 0.02, 0.02, 0.0193301, 0.0175, 0.015, 0.0125, 0.0106699]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("share", [0.3, 0.1, 0.0])
def test_one_cycle_is_that_of_torch(name: str, share: float) -> None:
    rules = settings({**HEAD, "name": name, "schedule": "one_cycle", "one_cycle": {"warmup_share": share}})
    parameters = [nn.Parameter(torch.zeros(1))]
    plain = torch.optim.SGD(parameters, 1, momentum=0.9) if name == "sgd" else torch.optim.AdamW(parameters)
    total = PLAN.steps(4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(plain, 0.02, total, pct_start=share)
    for step in rates(rules, PLAN, 4):
        expected = plain.param_groups[0]
        assert step["lr"] == pytest.approx(expected["lr"], rel=1e-9)
        momentum = "momentum" if name == "sgd" else "betas"
        assert step[momentum] == pytest.approx(expected[momentum], rel=1e-9)
        plain.step()
        if schedule.last_epoch < total - 1:
            schedule.step()


def test_one_cycle_may_have_its_top_at_the_first_step() -> None:
    """Where torch divides by zero."""
    rules = settings({**HEAD, "schedule": "one_cycle", "one_cycle": {"warmup_share": 0.05}})
    found = [step["lr"] for step in rates(rules, PLAN, 4)]
    assert found[0] == 0.02 and found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.02 / 25 / 1e4, rel=1e-6)


def test_one_cycle_can_leave_the_momentum() -> None:
    rules = settings({**HEAD, "schedule": "one_cycle", "one_cycle": {"momentum": None}})
    assert {step["momentum"] for step in rates(rules, PLAN, 2)} == {0.9}


def test_cosine_per_epoch_is_stepped_after_the_epoch_with_its_number() -> None:
    found = [step["lr"] for step in rates(settings({**HEAD, "schedule": "cosine_epoch", "min_lr": 0.004}), PLAN, 4)]
    assert found == pytest.approx([0.02] * 10 + [0.004 + 0.016 * (1 + 0.5**0.5) / 2] * 5 + [0.012] * 5)


def test_the_period_is_counted_from_the_start_of_each_epoch() -> None:
    due = [step["due"] for step in rates(settings({**HEAD, "period": 3}), PLAN, 2)]
    assert due == [True, False, False, True, False] * 2


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_group_that_is_not_due_keeps_weights_and_state(name: str) -> None:
    """As an optimizer of its own that is only stepped when it is due, while the other one goes on."""
    network, rules = model(), settings({**HEAD, "name": name, "period": 3})
    plain = copy.deepcopy(network)
    optimizer = build_optimizer(network, rules)
    tower = torch.optim.SGD(plain["tower"].parameters(), lr=0.1, momentum=0.9, nesterov=True)
    head: torch.optim.Optimizer = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, momentum=0.9, nesterov=True),
        "adam": torch.optim.Adam,
        "adamw": lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.0),
    }[name](plain["head"].parameters())
    for step in range(8):
        progress = Progress.of(PLAN, step, 2)
        set_learning_rate(optimizer, progress, rules)
        for theirs, ours in zip((tower, head), optimizer.param_groups, strict=True):
            theirs.param_groups[0]["lr"] = ours["lr"]
        loss(network, step).backward()
        loss(plain, step).backward()
        due = progress.step_in_epoch % 3 == 0
        # what is not used is no part of the norm that clipping looks at either
        assert all(bool(parameter.grad.any()) == due for parameter in network["head"].parameters())
        for one in (optimizer, tower, *([head] if due else [])):
            one.step()
        for found, expected in zip(network.parameters(), plain.parameters(), strict=True):
            assert torch.equal(found, expected)
        network.zero_grad()
        plain.zero_grad()
    for ours, theirs in zip(network["head"].parameters(), plain["head"].parameters(), strict=True):
        assert optimizer.state[ours].keys() == head.state[theirs].keys()
        assert all(torch.equal(optimizer.state[ours][key], head.state[theirs][key]) for key in head.state[theirs])


def loss(network: Any, step: int) -> torch.Tensor:
    torch.manual_seed(step)
    result: torch.Tensor = network["head"](network["tower"](torch.randn(6, 3))).square().sum()
    return result


def test_frozen_modules_are_evaluated_and_others_trained() -> None:
    network = model()
    build_optimizer(network, settings({"part": "tower.*", "frozen": True}))
    network.train()
    evaluate_frozen(network)
    assert [module.training for module in network["tower"].modules()] == [False] * 4
    assert network.training and network["head"].training
    statistics = network["tower"][1].running_mean.clone()
    assert torch.equal(loss(network, 0), loss(network, 0))
    assert torch.equal(network["tower"][1].running_mean, statistics)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer at ZeRO stage 0; it needs stage 1"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param at ZeRO stage 2; it needs stage 3"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}, 'expected {"device": "cpu"}'),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, 'expected {"device": "cpu"}'),
        ({"stage": 3, "offload_optimizer": "cpu"}, 'is "cpu"; expected {"device": "cpu"}'),
        ({"stage": 2, "cpu_offload": True}, "sets zero_optimization.cpu_offload; did you mean|valid"),
    ],
)
def test_offload_goes_to_the_cpu_or_is_refused(zero: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(InputError, match=message):
        read_deepspeed_json(path)
