"""Parity with the paper's code: what it counts and what its random baseline really trains (METHOD 10)."""

import statistics

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet50

import sparse_bwd as sb
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.selection.parity import code_cost

# True trained weights of the random baseline at revision 008e3e6f in multiples of the budget, 20 draws each.
MULTIPLES = {
    mobilenet_v2: {192_311: 0.33, 464_639: 0.24, 675_540: 0.23},
    resnet18: {980_715: 2.89, 2_369_480: 2.03, 3_444_987: 1.71},
    resnet50: {2_059_888: 2.37, 4_976_842: 1.76, 7_235_830: 1.61},
}


def converted(build) -> nn.Module:
    with torch.device("meta"):
        model = build()
    sb.convert(model)
    return model


def test_the_code_counts_42_million_weights_in_mobilenet_v2() -> None:
    model = converted(mobilenet_v2)
    table = cost_table(model)
    assert int(table.cost.sum()) == 2_189_760
    assert int(code_cost(model, table).sum()) == 42_735_840


@pytest.mark.parametrize("build", MULTIPLES, ids=lambda build: build.__name__)
def test_the_random_baseline_of_the_code_misses_its_budget_as_published(build) -> None:
    """Means of 20 draws, to the 0.02 that the draws of the table and these leave; the true one stays below 1."""
    model = converted(build)
    table = cost_table(model)
    for budget, multiple in MULTIPLES[build].items():
        spent = []
        for seed in range(20):
            policy = sb.RandomPolicy(model, sb.Budget(params=budget), seed=seed, parity=True)
            assert policy.cost.equal(code_cost(model, table))
            rows = policy._choose()
            spent.append(rows.summary(model).cost / budget)
        noise = statistics.stdev(spent) / 20**0.5
        assert statistics.fmean(spent) == pytest.approx(multiple, abs=0.005 + 4 * noise)
        assert noise < 0.05 * multiple


def test_velocity_in_parity_avoids_depthwise_channels() -> None:
    """They count up to C times what they cost, so that their score is divided by as much."""
    torch.manual_seed(0)
    chosen = {}
    for parity in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.ReLU(),
            nn.Conv2d(16, 16, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip
        sb.convert(model)
        policy = sb.VelocityPolicy(
            model,
            sb.Budget(params=200),
            torch.randn(4, 3, 9, 9),
            first="full",
            parity=parity,
            measure="exact",
        )
        policy.step()
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
        nn.functional.cross_entropy(model(torch.randn(8, 3, 9, 9)), torch.randint(4, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen[parity] = policy.step()
        assert policy.report.cost <= 200
    assert len(chosen[False]["2"].index) > len(chosen[True]["2"].index if "2" in chosen[True] else [])


def test_parity_is_refused_where_the_code_has_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    sb.convert(model)
    with pytest.raises(ValueError, match="axis 'out' under a budget of weights; got axis 'in'"):
        sb.RandomPolicy(model, sb.Budget(params=100), axis="in", parity=True)
    budget = sb.Budget(bytes=2**20, batch=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="parity=True"):
        sb.VelocityPolicy(model, budget, torch.zeros(2, 3, 8, 8), parity=True)


def test_the_state_of_a_policy_says_whether_it_was_in_parity() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    sb.convert(model)
    state = sb.RandomPolicy(model, sb.Budget(params=100), parity=True).state_dict()
    with pytest.raises(ValueError, match="parity True, this one False"):
        sb.RandomPolicy(model, sb.Budget(params=100)).load_state_dict(state)
    state = sb.VelocityPolicy(model, sb.Budget(params=100), torch.zeros(1, 3, 8, 8)).state_dict()
    del state["parity"]  # of before the random policy had it too
    sb.VelocityPolicy(model, sb.Budget(params=100), torch.zeros(1, 3, 8, 8)).load_state_dict(state)
