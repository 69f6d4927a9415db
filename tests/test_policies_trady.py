"""TraDy: which layers it keeps, and how it draws within them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.selection.gradients import GradientMeter
from sparse_bwd.selection.trady import top_share
from tests.small import Small, labelled, rows_of, small_net, train, trained, unread

THIRD = sb.Budget(fraction=0.3)


@pytest.fixture
def model() -> nn.Module:
    return small_net()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return labelled()


@pytest.mark.parametrize(
    ("scores", "share", "want"),
    [
        ([5.0, 1.0, 3.0, 1.0], 0.8, [0, 2]),  # 8 of 10
        ([5.0, 1.0, 3.0, 1.0], 0.81, [0, 2, 1]),
        ([5.0, 1.0, 3.0, 1.0], 0.01, [0]),
        ([5.0, 1.0, 3.0, 1.0], 1.0, [0, 2, 1, 3]),
        ([5.0, 0.0, 3.0], 1.0, [0, 2]),
        ([2.0], 0.5, [0]),
    ],
)
def test_top_share_is_the_fewest_layers(scores, share, want):
    assert top_share(torch.tensor(scores, dtype=torch.float64), share).tolist() == want


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_trady_keeps_the_layers_that_hold_the_share(data, axis, share):
    torch.manual_seed(1)
    model = Small()
    sb.convert(model)
    policy = sb.TraDyPolicy(model, THIRD, data, axis=axis, share=share)
    policy.step()
    meter, table = GradientMeter(data, F.cross_entropy), policy.table
    relative = meter.norms(model, table) / meter.space(model, table)
    sums = {
        name: float(part.sum()) for name, part in zip(table.names, relative.split(table.sizes), strict=True)
    }
    best = sorted(sums, key=lambda name: -sums[name])
    kept: list[str] = []
    while sum(sums[name] for name in kept) < share * sum(sums.values()):
        kept.append(best[len(kept)])
    assert set(policy.top_layers) == set(kept) >= set(policy.selection)
    assert len(kept) < len(best) or share == 0.97


def test_trady_draws_uniformly_within_the_kept_layers(model):
    """The prefix of a permutation of the kept rows, at true cost; every channel has its chance."""
    policy = sb.TraDyPolicy(model, sb.Budget(params=150), top_layers=["7", "2"], seed=3)
    table = cost_table(model, "in")
    assert policy.axis == "in" and policy.top_layers == ("2", "7")
    rows = [row for row in range(len(table)) if table.names[int(table.layer[row])] in ("2", "7")]
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(60):
        order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        want, spent = set(), 0
        for row in order:
            spent += int(table.cost[row])
            if spent > 150:
                break
            want.add(row)
        assert rows_of(policy.step(), table) == want
        seen |= want
    assert seen == set(rows)


def test_trady_redraws_or_not_and_measures_once(model, data):
    reads = []

    def counted() -> Any:
        reads.append(1)
        return data

    dynamic = sb.TraDyPolicy(model, THIRD, counted, seed=1)
    first = dynamic.step()
    kept, read = dynamic.top_layers, len(reads)
    train(model, 0)
    assert dynamic.step() != first and dynamic.top_layers == kept and len(reads) == read
    static = sb.TraDyPolicy(model, THIRD, top_layers=kept, seed=1, redraw=False)
    assert static.step() == first == static.step()
    assert sb.TraDyPolicy(model, THIRD, top_layers=kept, seed=2).step() != first


@pytest.mark.parametrize("budget", [0, 10**9])
def test_trady_at_the_edges_of_the_budget(model, budget):
    policy = sb.TraDyPolicy(model, sb.Budget(params=budget), top_layers=["0", "3"])
    selection = policy.step()
    assert trained(model) == ({"0": [0, 1, 2], "3": list(range(8))} if budget else {})
    assert selection.cost(model) == (policy.report.cost if budget else 0)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, ValueError, "labelled data"),
        ({"data": unread, "top_layers": ["0"]}, ValueError, "give one of the two"),
        ({"data": unread, "share": 0}, ValueError, "share is 0"),
        ({"data": unread, "share": 97}, ValueError, "at most 1"),
        ({"top_layers": ["0", "x"]}, ValueError, "top_layers must name layers .*got 'x'"),
        ({"top_layers": []}, ValueError, "got none"),
        ({"data": unread, "axis": "both"}, ValueError, "axis"),
        ({"data": 3}, TypeError, "data must be"),
    ],
)
def test_trady_refuses(model, kwargs, error, words):
    with pytest.raises(error, match=words):
        sb.TraDyPolicy(model, THIRD, **kwargs)


def test_a_resumed_trady_does_not_measure_again(model, data):
    policy = sb.TraDyPolicy(model, THIRD, data)
    policy.step()
    resumed = sb.TraDyPolicy(small_net(), THIRD, unread)
    resumed.load_state_dict(policy.state_dict())
    assert resumed.top_layers == policy.top_layers and resumed.step() == policy.step()
