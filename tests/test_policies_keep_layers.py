"""Policies with keep_layers=True: other channels of the same layers, so that a compiled step is compiled once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.selection.policy import BudgetPolicy
from tests.small import small_net, train, trained

PROBE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))
LABELLED = (PROBE, torch.arange(4) % 3)
MAKERS: dict[str, Any] = {
    "velocity": lambda model, budget, **more: sb.VelocityPolicy(model, budget, PROBE, **more),
    "slowest": lambda model, budget, **more: sb.VelocityPolicy(model, budget, PROBE, order="slowest", **more),
    "random": sb.RandomPolicy,
    "gradient": lambda model, budget, **more: sb.GradientNormPolicy(model, budget, LABELLED, **more),
    "weight": sb.WeightNormPolicy,
    "trady": lambda model, budget, **more: sb.TraDyPolicy(model, budget, LABELLED, **more),
}
BUDGETS = {
    "weights": lambda: sb.Budget(fraction=0.3),
    "tight": lambda: sb.Budget(fraction=0.15),
    "flops": lambda: sb.Budget(flops=100_000, batch=PROBE),
}


def patterns(policy: BudgetPolicy, steps: int) -> tuple[list[Any], list[Any]]:
    """After each selection: which tensors are trained and whether whole, and the selection itself."""
    opened, selections = [], []
    for step in range(steps):
        selections.append(policy.step().to_dict())
        swapped = sb.layers(policy.model)
        opened.append(
            {(n, kind, s.index is None) for n, m in swapped.items() for kind, s in m._slots.items()}
        )
        train(policy.model, step)
    return opened, selections


CASES = [(name, budget, axis) for name in MAKERS for budget, axis in (("weights", "out"), ("tight", "in"))]


@pytest.mark.parametrize(
    ("name", "budget", "axis"), [*CASES, ("velocity", "flops", "out"), ("random", "flops", "in")]
)
def test_layers_stay_and_the_budget_holds(name: str, budget: str, axis: str) -> None:
    model = small_net()
    policy = MAKERS[name](model, BUDGETS[budget](), axis=axis, keep_layers=True)
    opened, selections = patterns(policy, 3 if budget == "flops" else 5)
    assert opened[0]
    assert all(each == opened[0] for each in opened)
    assert policy.budget is None or policy.report.cost <= policy.budget
    assert policy.limits is None or not policy.limits.excess(policy.need)
    if name == "random" and budget == "tight":
        assert selections[0] != selections[1], "the channels are drawn again"
        free = sb.RandomPolicy(small_net(), BUDGETS[budget](), axis=axis)
        assert len({frozenset(each) for each in patterns(free, 8)[0]}) > 1, "left alone, layers change"


def test_a_layer_that_was_trained_whole_stays_whole_and_others_never_are() -> None:
    model = small_net()
    policy = sb.WeightNormPolicy(model, sb.Budget(fraction=0.5), keep_layers=True)
    table = policy.table
    names = table.names[:2]
    kept = torch.cat([(table.layer == 0).nonzero().flatten(), (table.layer == 1).nonzero().flatten()[:1]])
    order = table.within(torch.arange(len(table)).flip(0), kept)
    chosen = table.selection(order)
    assert set(chosen) == set(names)
    assert len(chosen[names[0]].index) == table.sizes[0]  # type: ignore[arg-type]
    assert len(chosen[names[1]].index) == table.sizes[1] - 1  # type: ignore[arg-type]
    first = table.layer[order[: table.sizes[0] + 1]].tolist()
    assert first.count(0) == table.sizes[0] and first.count(1) == 1, "what must be trained comes first"
    assert torch.equal(table.rows(chosen), order.sort().values), "rows is the inverse of selection"


def test_a_first_selection_beyond_the_budget_binds_nobody() -> None:
    model = small_net()
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.3), PROBE, first="full", keep_layers=True)
    opened, _ = patterns(policy, 4)
    assert opened[1] != opened[0] and opened[1] == opened[2] == opened[3]
    assert trained(model)


def test_ties_and_saved_states_of_other_policies_are_refused() -> None:
    model: nn.Module = small_net()
    budget = sb.Budget(fraction=0.3)
    with pytest.raises(ValueError, match="leave out parity or keep_layers"):
        sb.VelocityPolicy(model, budget, PROBE, parity=True, keep_layers=True)
    state: dict[str, Tensor] = sb.RandomPolicy(model, budget).state_dict()
    with pytest.raises(ValueError, match="keep_layers False, this one True"):
        sb.RandomPolicy(model, budget, keep_layers=True).load_state_dict(state)
