"""Budgets of bytes and operations: kept by every step, used, and refused in sentences."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparse_bwd as sb
from benchmarks.budgets import NETWORKS, keep_a_budget
from sparse_bwd.memory import held_between_steps, peak_bytes, predict
from sparse_bwd.memory.predict import OPTIMIZERS
from sparse_bwd.selection.charges import channel_costs, state_numbers
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.selection.flops import backward_flops
from tests.small import small_net

X = torch.zeros(16, 3, 24, 24)
KIB = 2**10


def images(count: int = 16, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


class Tower(nn.Sequential):
    """Six convolutions, one of them depthwise and one grouped, in which a channel is a small part of the whole."""

    def __init__(self) -> None:
        widths, layers = (3, 16, 24, 24, 32, 32, 48), []
        for i, (c_in, c_out) in enumerate(itertools.pairwise(widths)):
            groups = {2: 24, 4: 4}.get(i, 1)
            layers += [
                nn.Conv2d(c_in, c_out, 3, 1 + i % 2, 1, groups=groups, bias=i == 4),
                nn.BatchNorm2d(c_out),
            ]
            layers += [nn.ReLU6(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5))


def net(batch_norm: str = "frozen") -> nn.Module:
    torch.manual_seed(0)
    model = Tower()
    sb.convert(model, batch_norm)
    return model


def least(model: nn.Module, optimizer: str = "sgd_momentum") -> int:
    """What a step takes that trains the classifier alone."""
    return predict(model, {}, X, optimizer, lambda out: F.cross_entropy(out, out.new_zeros(16).long())).needed


def everything(model: nn.Module, axis: str, optimizer: str = "sgd_momentum") -> int:
    whole = {name: sb.Channels(None, axis) for name in cost_table(model).names}
    return predict(
        model, whole, X, optimizer, lambda out: F.cross_entropy(out, out.new_zeros(16).long())
    ).needed


def make_policy(kind: str, model: nn.Module, budget: sb.Budget, axis: str) -> Any:
    labelled = (images(4), torch.tensor([0, 1, 2, 3]))
    if kind == "velocity":
        return sb.VelocityPolicy(model, budget, images(2), axis=axis)
    if kind == "random":
        return sb.RandomPolicy(model, budget, axis=axis)
    if kind == "trady":
        return sb.TraDyPolicy(model, budget, labelled, axis=axis)
    if kind == "gradient":
        return sb.GradientNormPolicy(model, budget, labelled, axis=axis)
    return sb.WeightNormPolicy(model, budget, axis=axis)


def one_more_fits(policy: Any) -> bool:
    """Whether some channel could be added to the selection without breaking the budget, tried one by one."""
    chosen = policy.selection
    for name, size in policy.table.channels.items():
        had = set() if name not in chosen else set(chosen[name].index.tolist())
        for channel in range(size):
            if channel not in had:
                index = sorted({*had, channel})
                more = sb.Selection({**chosen, name: sb.Channels(index, policy.axis, policy.bias)})
                if not policy.limits.excess(policy.limits.need(more)):
                    return True
                break
    return False


@pytest.mark.parametrize(
    ("kind", "axis", "share"),
    [
        ("velocity", "out", 0.3), ("velocity", "in", 0.7), ("random", "out", 0.7), ("random", "in", 0.3),
        ("trady", "in", 0.5), ("gradient", "out", 0.5),
    ],
)  # fmt: skip
def test_every_step_keeps_the_budget_and_uses_it(kind: str, axis: str, share: float) -> None:
    """Measured bytes of the step, and of all that training holds, are at most the budget and at least 90 % of it."""
    model, optimizer_name = net(), "adam"
    low, high = least(model, optimizer_name), everything(model, axis, optimizer_name)
    budget = int(low + share * (high - low)) + cost_table(model).nbytes
    policy = make_policy(kind, model, sb.Budget(bytes=budget, batch=X, optimizer=optimizer_name), axis)
    x, y = images(), torch.zeros(16, dtype=torch.int64)
    policy.step()
    optimizer = torch.optim.Adam(sb.trainable_parameters(model))

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(1 if kind != "velocity" else 2):
        step()
        policy.step(optimizer)
        step()
        measured = peak_bytes(step, "cpu").peak + held_between_steps(model, optimizer) + policy.velocity_bytes
        assert measured <= policy.report.needed_bytes <= policy.report.budget_bytes == budget
        assert policy.report.needed_bytes >= 0.9 * budget or not one_more_fits(policy)
        assert policy.report.budget is None and policy.report.cost > 0
        assert "MiB" in str(policy.report)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_budget_for_everything_trains_everything(axis: str) -> None:
    model = net()
    budget = sb.Budget(bytes=2 * everything(model, axis) + 2**20, batch=X)
    for policy in (sb.RandomPolicy(model, budget, axis=axis), make_policy("velocity", model, budget, axis)):
        for _ in range(2):
            policy.step()
        assert policy.report.channels == len(policy.table)


@pytest.mark.parametrize(("axis", "share"), [("out", 0.4), ("in", 0.8)])
def test_operations_are_kept_and_used(axis: str, share: float) -> None:
    model = net()
    all_of_it = sum(
        backward_flops(model, {n: sb.Channels(None, axis) for n in cost_table(model).names}, X).values()
    )
    policy = make_policy("velocity", model, sb.Budget(flops=share * all_of_it, batch=X), axis)
    for _ in range(2):
        policy.step()
        taken = sum(backward_flops(model, None, X).values())
        assert taken == policy.report.backward_flops <= share * all_of_it
        assert taken >= 0.9 * share * all_of_it or not one_more_fits(policy)
        assert "GFLOPs" in str(policy.report) and policy.report.needed_bytes is None


def test_both_limits_hold_together() -> None:
    model = net()
    whole = {n: sb.Channels(None, "in") for n in cost_table(model).names}
    operations = 0.6 * sum(backward_flops(model, whole, X).values())
    low, high = least(model), everything(model, "in")
    size = int((low + high) / 2) + cost_table(model).nbytes + 4096
    policy = make_policy("velocity", model, sb.Budget(bytes=size, flops=operations, batch=X), "in")
    for _ in range(2):
        policy.step()
        report = policy.report
        assert report.needed_bytes <= size and report.backward_flops <= operations and report.channels > 0
        assert max(report.needed_bytes / size, report.backward_flops / operations) > 0.9 or not one_more_fits(
            policy
        )


@pytest.mark.parametrize("model_name", ["mobilenet_v2", "resnet18"])
def test_operations_are_those_that_pytorch_counts(model_name: str) -> None:
    model = torchvision.models.get_model(model_name, num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    dense = copy.deepcopy(model)
    with FlopCounterMode(display=False) as counter:
        dense(x)
    counts = counter.get_flop_counts()
    first = {"mobilenet_v2": "MobileNetV2.features.0.0", "resnet18": "ResNet.conv1"}[model_name]
    # Twice the forward, less dx of the first layer. (PyTorch's own count of backward is wrong for depthwise layers.)
    expected = 2 * counter.get_total_flops() - sum(counts[first].values())
    sb.convert(model)
    whole = {name: sb.Channels(None) for name in cost_table(model).names}
    assert sum(backward_flops(model, whole, x).values()) == expected
    head = {"mobilenet_v2": 2 * 2 * 1280 * 10, "resnet18": 2 * 2 * 512 * 10}[model_name]
    assert sum(backward_flops(model, {}, x).values()) == head  # the classifier's own weights, and no dx


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("seed", range(2))
def test_additive_costs_are_what_a_selection_adds(axis: str, seed: int) -> None:
    """Kept bytes, gradients, state and copies of a selection, less those of none; biases and few bytes aside."""
    model = net()
    table = cost_table(model, axis)
    costs = channel_costs(model, table, X, OPTIMIZERS["sgd_momentum"])
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[: 20 + 60 * seed]
    counts = torch.bincount(table.layer[rows], minlength=len(table.names))[costs.order]
    found, nothing = (predict(model, chosen, X) for chosen in (table.selection(rows), {}))
    added = sum(
        getattr(found, part) - getattr(nothing, part) for part in ("saved", "grads", "optimizer", "compact")
    )
    # Of a grouped layer every group counts as touched.
    assert costs.order.tolist() == list(range(6))
    untouched = 16 * 32 * 36 * 4 if axis == "out" and int(counts[4]) else 0
    assert -96 * len(rows) <= costs.bytes.cost(counts) - added <= 64 * len(rows) + untouched


def test_state_of_optimizers() -> None:
    found = {name: state_numbers(make) for name, make in OPTIMIZERS.items()}
    assert found == {"sgd": 0, "sgd_momentum": 1, "adam": 2, "adamw": 2, "rmsprop": 1, "adagrad": 1} | found
    assert [round(found[name]) for name in ("sgd", "sgd_momentum", "adam", "adamw")] == [0, 1, 2, 2]


def test_a_resumed_policy_selects_the_same() -> None:
    model = net()
    budget = sb.Budget(bytes=int((least(model) + everything(model, "in")) / 2) + 16 * KIB, batch=X)
    policy = make_policy("velocity", model, budget, "in")
    policy.step()
    state, values = copy.deepcopy(policy.state_dict()), copy.deepcopy(model.state_dict())
    expected = policy.step()
    again = net()
    again.load_state_dict(values)
    resumed = make_policy("velocity", again, budget, "in")
    resumed.load_state_dict(state)
    assert resumed.report.needed_bytes == state["need"]["bytes"]
    sb.apply(again, resumed.selection)
    assert resumed.step() == expected
    with pytest.raises(ValueError, match="budget of"):
        make_policy(
            "velocity", again, sb.Budget(bytes=budget.bytes + 512 * KIB, batch=X), "in"
        ).load_state_dict(state)
    with pytest.raises(ValueError, match="has budget None, this one"):
        make_policy("velocity", again, sb.Budget(fraction=0.5), "in").load_state_dict(state)


def test_bad_budgets_are_sentences() -> None:
    model = net()
    with pytest.raises(ValueError, match="give an example input of the model as batch="):
        sb.RandomPolicy(model, sb.Budget(bytes=2**30))
    with pytest.raises(ValueError, match=r"too small for this batch: with a single channel.*KiB|MiB\. Raise"):
        sb.RandomPolicy(model, sb.Budget(bytes=100, batch=X))
    with pytest.raises(ValueError, match="GFLOPs of backward"):
        sb.RandomPolicy(model, sb.Budget(flops=10, batch=X))
    with pytest.raises(ValueError, match="Unknown optimizer"):
        sb.RandomPolicy(model, sb.Budget(bytes=2**30, batch=X, optimizer="sdg"))
    with pytest.raises(ValueError, match="leave out first="):
        budget = sb.Budget(bytes=int((least(model) + everything(model, "out")) / 2) + 16 * KIB, batch=X)
        sb.VelocityPolicy(model, budget, images(2), first="full").step()


def test_the_model_keeps_its_mode_and_values() -> None:
    model = net("train").eval()
    model.get_submodule("0").train()
    modes = [module.training for module in model.modules()]
    values = copy.deepcopy(model.state_dict())
    sb.RandomPolicy(model, sb.Budget(bytes=2**30, batch=X)).step()
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_layers_that_the_batch_does_not_reach_cost_their_weights() -> None:
    model = small_net()
    model.append(nn.Identity())
    table = cost_table(model)
    costs = channel_costs(model, table, torch.zeros(2, 3, 6, 6), OPTIMIZERS["sgd"])
    assert sorted(costs.order.tolist()) == list(range(len(table.names)))
    assert bool((costs.bytes.unit > 0).all()) and bool((costs.flops.unit > 0).all())


@pytest.mark.long
@pytest.mark.parametrize("share", [0.1, 0.8])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("kind", ["random", "velocity"])
@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks_keep_their_budgets(name: str, kind: str, axis: str, layout: str, share: float) -> None:
    row = keep_a_budget(name, layout, axis, kind, share)
    assert row["measured"] <= row["needed"] <= row["budget"]
    assert row["needed"] <= 1.1 * row["measured"]
    assert row["needed"] >= 0.9 * row["budget"]
