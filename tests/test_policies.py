"""Policies: what they select, budgets, draws, errors."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.costs import cost_table, prefix_length
from sparse_bwd.selection.schemes import Scheme
from tests.small import small_net, train, trained


@pytest.fixture
def model() -> nn.Module:
    return small_net()


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def labelled(probe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return probe, torch.arange(len(probe)) % 3


ALL = [
    lambda m, p, axis: sb.VelocityPolicy(m, sb.Budget(fraction=0.3), probe=p, axis=axis),
    lambda m, p, axis: sb.RandomPolicy(m, sb.Budget(fraction=0.3), axis=axis),
    lambda m, p, axis: sb.FullPolicy(m, axis=axis),
    lambda m, p, axis: sb.FrozenPolicy(m, axis=axis),
    lambda m, p, axis: sb.SparseUpdatePolicy(m, Scheme("own", 3, 3, (0, 2), (0.5, 0.25)), axis=axis),
    lambda m, p, axis: sb.WeightNormPolicy(m, sb.Budget(fraction=0.3), axis=axis),
    lambda m, p, axis: sb.NEqPolicy(m, measure="weights", axis=axis, threshold=1e-5),
    lambda m, p, axis: sb.NEqPolicy(m, p, axis=axis, top=0.5),
    lambda m, p, axis: sb.TraDyPolicy(m, sb.Budget(fraction=0.3), labelled(p), axis=axis),
    lambda m, p, axis: sb.GradientNormPolicy(m, sb.Budget(fraction=0.3), labelled(p), axis=axis),
]
IDS = ["velocity", "random", "full", "frozen", "scheme", "weight", "neq-weights", "neq", "trady", "gradient"]
UNMEASURED = ALL[1:7]  # they run no forward


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("make", ALL, ids=IDS)
def test_every_policy_applies_what_it_reports(model, probe, make, axis):
    policy = make(model, probe, axis)
    for step in (1, 2, 3):
        selection = policy.step()
        assert policy.selection is selection and policy.axis == axis
        want = {
            name: c.index if c.index is None else c.index.tolist()
            for name, c in selection.items()
            if c.index is None or len(c.index)
        }
        assert trained(model) == want
        spent = sum(p.numel() for n, p in model.named_parameters() if n.endswith("trainable_weight"))
        report = policy.report
        assert report.step == step and report.cost == spent == selection.cost(model)
        assert report.total == 3 * 8 * 9 + 8 * 9 + 8 * 16 + 640
        assert report.channels == selection.summary(model).channels and report.layers == len(want)
        assert report.budget is None or report.cost <= report.budget
        assert type(policy).__name__ in str(report) and f"{spent:,} weights" in str(report)
        assert report.to_dict()["unmeasured"] == []
        train(model, step)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_full_and_frozen_are_static(model, axis):
    full = sb.FullPolicy(model, axis=axis)
    first = full.step()
    assert first.cost(model) == full.table.total
    assert all(
        layer.trainable_bias is None or layer.trainable_bias.numel() == len(layer.bias)
        for layer in sb.layers(model).values()
    )
    train(model, 0)
    assert full.step() == first
    frozen = sb.FrozenPolicy(model, axis=axis)
    assert frozen.step() == sb.Selection() == frozen.step()
    assert trained(model) == {}


# Random


def test_random_spends_the_true_budget(model):
    """Greedy prefix in drawn order, each channel at its own cost."""
    policy = sb.RandomPolicy(model, sb.Budget(fraction=0.4), seed=3)
    selection = policy.step()
    table = cost_table(model)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(3))
    spent, chosen = 0, {}
    for row in order.tolist():
        cost = int(table.cost[row])
        if spent + cost > policy.budget:
            assert spent == selection.cost(model) <= policy.budget < spent + cost
            break
        spent += cost
        chosen.setdefault(table.names[int(table.layer[row])], []).append(int(table.channel[row]))
    assert selection == sb.Selection(chosen)


@pytest.mark.parametrize(("name", "budget"), [("mobilenet_v2", 192_311), ("resnet18", 980_715)])
def test_random_on_real_networks_is_within_one_channel_of_the_budget(name, budget):
    net = torchvision.models.get_model(name, weights=None)
    sb.convert(net)
    table = cost_table(net)
    for seed in range(3):
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        spent = int(table.cost[order[: prefix_length(table.cost[order], budget)]].sum())
        assert budget - int(table.cost.max()) < spent <= budget


def test_random_redraw_or_once(model):
    redrawn = sb.RandomPolicy(model, sb.Budget(fraction=0.3), seed=1)
    once = sb.RandomPolicy(model, sb.Budget(fraction=0.3), seed=1, redraw=False)
    first = redrawn.step()
    assert redrawn.step() != first
    kept = once.step()
    assert kept == first == once.step() == once.step()
    assert sb.RandomPolicy(model, sb.Budget(fraction=0.3), seed=2).step() != first


def test_random_leaves_the_global_generator_alone(model):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    sb.RandomPolicy(model, sb.Budget(fraction=0.3)).step()
    assert torch.equal(torch.get_rng_state(), state)


# Budget edges


@pytest.mark.parametrize("kind", ["random", "velocity"])
def test_budget_edges(model, probe, kind):
    def make(budget: sb.Budget):
        return (
            sb.RandomPolicy(model, budget)
            if kind == "random"
            else sb.VelocityPolicy(model, budget, probe=probe)
        )

    total = cost_table(model).total
    for budget in (sb.Budget(params=total), sb.Budget(params=10 * total), sb.Budget(fraction=1.0)):
        policy = make(budget)
        for step in range(2):
            assert policy.step().cost(model) == total and policy.report.channels == len(policy.table)
            train(model, step)
    with pytest.warns(UserWarning, match="below the cheapest channel, which costs 8"):
        below = make(sb.Budget(params=7))
    assert below.step() == sb.Selection()
    assert make(sb.Budget(params=0)).step() == sb.Selection()
    with pytest.raises(ValueError, match=r"give an example input of the model as batch="):
        make(sb.Budget(bytes=2**20))
    with pytest.raises(TypeError, match="must be a Budget"):
        make(1000)


def test_first_channel_in_line_too_dear(model):
    policy = sb.RandomPolicy(model, sb.Budget(params=10), seed=1)
    with pytest.warns(UserWarning, match="first channel in line"):
        for _ in range(50):
            policy.step()


def test_a_forward_runs_only_where_one_is_needed(model, probe):
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    for make in UNMEASURED:
        make(model, probe, "out").step()
    assert not calls
    ALL[0](model, probe, "out").step()
    assert len(calls) == 1


def test_a_changed_model_is_an_error(model, probe):
    policies = [make(model, probe, "out") for make in ALL]
    model[3] = nn.Conv2d(8, 16, 1)
    for policy in policies:
        with pytest.raises(ValueError, match=r"changed.*layers 3\)"):
            policy.step()
    with pytest.raises(ValueError, match="convert"):
        sb.RandomPolicy(nn.Sequential(nn.Linear(2, 2)), sb.Budget(params=1))
