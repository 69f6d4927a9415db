"""Budget, the cost table and the greedy prefix."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.costs import cost_table, greedy_prefix, prefix_length
from tests.small import Small


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    small = Small()
    sb.convert(small)
    return small


# Budget


@pytest.mark.parametrize("kwargs", [{}, {"params": 1, "fraction": 0.1}, {"params": 1, "bytes": 1}])
def test_budget_has_exactly_one_unit(kwargs):
    with pytest.raises(ValueError, match="exactly one"):
        sb.Budget(**kwargs)


@pytest.mark.parametrize("name", ["params", "fraction", "bytes"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_budget_refuses_no_amounts(name, value):
    with pytest.raises(ValueError, match=name):
        sb.Budget(**{name: value})


def test_budget_refuses_other_things():
    for value in ("10", True, [1]):
        with pytest.raises(TypeError, match="number"):
            sb.Budget(params=value)
    with pytest.raises(ValueError, match="whole number"):
        sb.Budget(params=0.5)
    with pytest.raises(ValueError, match="budget of bytes or operations"):
        sb.Budget(params=1, optimizer="sgd")
    with pytest.raises(ValueError, match=r"not one of weights; use params= or fraction="):
        sb.Budget(bytes=2**20, optimizer="sgd").weights(100)
    with pytest.warns(UserWarning, match="fraction=0.088"):
        assert sb.Budget(fraction=8.8).weights(100) == 880


def test_budget_in_weights():
    total = 2_189_760
    ratios = {
        0.0878233231: 192_311,
        0.1508110478: 330_240,
        0.212187637: 464_639,
        0.2735642262: 599_039,
        0.3084995616: 675_540,
    }
    for ratio, weights in ratios.items():
        assert sb.Budget(fraction=ratio).weights(total) == weights
    assert sb.Budget(params=7).weights(total) == 7
    assert [str(sb.Budget(**b)) for b in ({"params": 1000}, {"fraction": 0.1}, {"bytes": 1024})] == [
        "1,000 weights",
        "0.1 of all weights",
        "1,024 bytes",
    ]


# Costs


@pytest.mark.parametrize(
    ("name", "weights", "neurons", "convs"),
    [
        ("mobilenet_v2", 2_189_760, 17_056, 52),
        ("resnet18", 11_166_912, 4_800, 20),
        ("resnet50", 23_454_912, 26_560, 53),
    ],
)
def test_costs_sum_to_the_weight_count(name, weights, neurons, convs):
    net = torchvision.models.get_model(name, weights=None)
    sb.convert(net)
    for axis in ("out", "in"):
        table = cost_table(net, axis)
        assert int(table.cost.sum()) == table.total == weights
    table = cost_table(net)
    assert len(table) == neurons and len(table.names) == convs
    for layer, unit in zip(sb.layers(net).values(), table.unit, strict=True):
        assert layer.groups == 1 or unit == 9  # a depthwise neuron has k*k weights


def test_cost_table_rows(model):
    table = cost_table(model, "in")
    assert table.names == ("stem", "depth", "grouped", "hidden")
    assert table.sizes == (3, 8, 8, 12) and table.unit == (72, 9, 6, 6) and table.cheapest == 6
    assert table.layer.tolist() == [0] * 3 + [1] * 8 + [2] * 8 + [3] * 12
    assert table.channel.tolist() == [*range(3), *range(8), *range(8), *range(12)]
    chosen = table.selection(torch.tensor([30, 0, 3]), "all")
    assert chosen == sb.Selection(
        {n: sb.Channels([i], "in", "all") for n, i in (("stem", 0), ("depth", 0), ("hidden", 11))}
    )
    with pytest.raises(ValueError, match="axis"):
        cost_table(model, "both")


def test_cost_table_needs_layers():
    with pytest.raises(ValueError, match="convert"):
        cost_table(nn.Conv2d(3, 3, 1))


def test_layers_frozen_by_the_user_are_skipped():
    net = Small()
    net.stem.weight.requires_grad_(False)
    sb.convert(net)
    table = cost_table(net)
    assert "stem" not in table.names and table.total == int(table.cost.sum()) + 8 * 27
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    frozen = Small().requires_grad_(False)
    sb.convert(frozen)
    with pytest.raises(ValueError, match="requires_grad"):
        cost_table(frozen)


def loop_prefix(score: list[float], cost: list[int], budget: int, parity: bool) -> list[int]:
    """The rule of METHOD 1.3, one channel at a time."""
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    chosen, spent = [], 0
    for i in order:
        if spent + cost[i] > budget:
            return [j for j in chosen if not parity or score[j] > score[i]]
        chosen.append(i)
        spent += cost[i]
    return chosen


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]) | st.floats(0, 10), st.integers(1, 50)),
        min_size=1,
        max_size=40,
    ),
    share=st.floats(0, 1.1),
    parity=st.booleans(),
)
def test_greedy_prefix_against_a_loop(rows, share, parity):
    score, cost = [r[0] for r in rows], [r[1] for r in rows]
    budget = int(sum(cost) * share)
    chosen = greedy_prefix(torch.tensor(score, dtype=torch.float64), torch.tensor(cost), budget, parity)
    assert chosen.tolist() == loop_prefix(score, cost, budget, parity)


def test_prefix_is_exact_beyond_float_range():
    cost = torch.tensor([2**53, 1, 1])
    assert (
        prefix_length(cost, 2**53) == 1
        and prefix_length(cost, 2**53 + 1) == 2
        and prefix_length(cost, 0) == 0
    )


def test_prefix_never_skips_to_a_cheaper_channel():
    score, cost = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5, 100, 1])
    assert greedy_prefix(score, cost, 50).tolist() == [0]


def test_no_warning_for_ordinary_budgets(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb.RandomPolicy(model, sb.Budget(fraction=0.5))
        sb.RandomPolicy(model, sb.Budget(params=0))
