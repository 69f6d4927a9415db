"""Policies that rank by gradient or weight: what they select, on hand-made and on measured scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.selection import RankedPolicy
from sparse_bwd.selection.gradients import GradientMeter
from tests.small import Small, labelled, rows_of, small_net, train, trained, unread

THIRD = sb.Budget(fraction=0.3)


@pytest.fixture
def model() -> nn.Module:
    return small_net()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return labelled()


def hand_prefix(score: list[float], cost: list[int], budget: int) -> set[int]:
    """Best first, in pure Python, to the first that does not fit."""
    chosen, spent = set(), 0
    for row in sorted(range(len(score)), key=lambda row: (-score[row], row)):
        if spent + cost[row] > budget:
            break
        spent += cost[row]
        chosen.add(row)
    return chosen


class HandMade(RankedPolicy):
    """Ranks by what the test says."""

    scores: Tensor

    def _score(self) -> Tensor:
        return self.scores


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_ranked_policies_take_the_greedy_prefix(model, order, axis):
    policy = HandMade(model, THIRD, axis, order)
    for seed in range(20):
        policy.scores = torch.randint(6, (len(policy.table),), generator=torch.Generator().manual_seed(seed))
        sign = 1 if order == "largest" else -1
        want = hand_prefix((sign * policy.scores).tolist(), policy.table.cost.tolist(), policy.budget)
        assert rows_of(policy.step(), policy.table) == want
        assert policy.report.cost <= policy.budget and policy.report.policy == "HandMade"


def test_ranked_policies_keep_the_first_selection_if_told(model):
    policy = HandMade(model, THIRD, refresh=False)
    policy.scores = torch.arange(len(policy.table)).double()
    first = policy.step()
    policy.scores = -policy.scores
    assert policy.step() == first
    policy.refresh = True
    assert policy.step() != first


def test_a_score_that_is_none_is_a_sentence(model):
    policy = HandMade(model, THIRD)
    policy.scores = torch.zeros(3)
    with pytest.raises(ValueError, match=r"HandMade._score\(\) must give 42 finite numbers.*shape \(3,\)"):
        policy.step()
    policy.scores = torch.full((len(policy.table),), float("nan"))
    with pytest.raises(ValueError, match="got NaN or infinity"):
        policy.step()
    with pytest.raises(ValueError, match="order is 'best'; it must be 'largest' or 'smallest'"):
        HandMade(model, THIRD, order="best")
    assert trained(model) == {}


# Gradient


@pytest.mark.parametrize("score", ["norm", "per_weight", "relative"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_gradient_policy_ranks_by_the_gradient(model, data, axis, score):
    policy = sb.GradientNormPolicy(model, THIRD, data, axis=axis, score=score)
    for step in range(2):
        meter, table = GradientMeter(data, F.cross_entropy), policy.table
        norms = meter.norms(model, table)
        divisor = {"norm": 1, "per_weight": table.cost, "relative": meter.space(model, table)}[score]
        want = hand_prefix((norms / divisor).tolist(), table.cost.tolist(), policy.budget)
        assert rows_of(policy.step(), table) == want
        assert 0.3 * table.total - int(table.cost.max()) < policy.report.cost <= policy.budget
        train(model, step)


def test_the_three_scores_differ(model, data):
    found = [
        sb.GradientNormPolicy(model, THIRD, data, axis="in", score=score).step()
        for score in ("norm", "per_weight", "relative")
    ]
    assert found[0] != found[1] != found[2] != found[0]


def test_gradient_policy_follows_the_training(model, data):
    """Scores are new at every step; with refresh=False the first are kept, and the data is not read again."""
    follows = sb.GradientNormPolicy(model, THIRD, data)
    first = follows.step()
    with torch.no_grad():
        sb.layers(model)["7"].weight.normal_()
    assert follows.step() != first
    reads = []
    kept = sb.GradientNormPolicy(model, THIRD, lambda: reads.append(1) or data, refresh=False)
    assert kept.step() == kept.step() and len(reads) == 1


def test_gradient_policy_uses_the_loss_it_is_given(model, data):
    squared = sb.GradientNormPolicy(model, THIRD, data, lambda outputs, _: outputs.square().mean())
    assert squared.step() != sb.GradientNormPolicy(model, THIRD, data).step()


def test_layers_without_a_gradient_are_reported(data):
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.used(x).mean((2, 3)))

    net = Unused()
    sb.convert(net)
    for policy in (sb.GradientNormPolicy(net, THIRD, data), sb.TraDyPolicy(net, THIRD, data)):
        policy.step()
        assert policy.report.unmeasured == ("unused",) and list(policy.selection) == ["used"]


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        (
            {"score": "gradient"},
            ValueError,
            "score is 'gradient'; it must be 'norm' or 'per_weight' or 'relative'",
        ),
        ({"order": "best"}, ValueError, "order"),
        ({"mode": "train"}, ValueError, "mode"),
        ({"axis": "both"}, ValueError, "axis"),
        ({"bias": "some"}, ValueError, "bias"),
        ({"data": None}, TypeError, "data must be"),
        ({"loss_fn": 1}, TypeError, "loss_fn"),
        ({"budget": 100}, TypeError, "must be a Budget"),
    ],
)
def test_gradient_policy_refuses(model, data, kwargs, error, words):
    with pytest.raises(error, match=words):
        sb.GradientNormPolicy(model, **{"budget": THIRD, "data": data, **kwargs})


@pytest.mark.parametrize("make", [sb.GradientNormPolicy, sb.TraDyPolicy])
def test_measurements_that_rank_nothing_leave_the_policy_as_it_was(model, data, make):
    def zero(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * 0).sum()

    policy = make(model, THIRD, data, zero)
    with pytest.raises(ValueError, match="zero in all 4 layers"):
        policy.step()
    assert policy.selection is None and policy.steps == 0 and trained(model) == {}
    with torch.no_grad():
        sb.layers(model)["3"].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"loss is nan.*diverged"):
        make(model, THIRD, data).step()


# Weight


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("score", ["norm", "per_weight"])
def test_weight_policy_ranks_by_the_weight(axis, order, score):
    torch.manual_seed(3)
    model = Small()
    sb.convert(model)
    policy = sb.WeightNormPolicy(model, THIRD, axis=axis, score=score, order=order)
    norms: list[float] = []
    for layer in sb.layers(model).values():
        weight, groups = layer.weight.detach().double(), getattr(layer, "groups", 1)
        rows, width = weight.shape[0] // groups, weight.shape[1]
        for c in range(layer.num_channels(axis)):
            g, column = divmod(c, width)
            part = weight[c] if axis == "out" else weight[g * rows : (g + 1) * rows, column]
            norms.append(float(part.square().sum().sqrt()))
    divisor = policy.table.cost.tolist() if score == "per_weight" else [1] * len(norms)
    sign = 1 if order == "largest" else -1
    scores = [sign * norm / unit for norm, unit in zip(norms, divisor, strict=True)]
    want = hand_prefix(scores, policy.table.cost.tolist(), policy.budget)
    assert rows_of(policy.step(), policy.table) == want


def test_weight_policy_follows_trained_values(model):
    """What waits in compact Parameters counts; no forward is needed, and none is made."""
    model.register_forward_hook(unread)
    policy = sb.WeightNormPolicy(model, THIRD)
    first = policy.step()
    name = next(iter(first))
    with torch.no_grad():
        sb.layers(model)[name].trainable_weight.zero_()
    second = policy.step()
    assert second != first
    assert name not in second or not set(second[name].index.tolist()) & set(first[name].index.tolist())
    kept = sb.WeightNormPolicy(model, THIRD, refresh=False)
    first = kept.step()
    with torch.no_grad():
        sb.layers(model)[next(iter(first))].trainable_weight.zero_()
    assert kept.step() == first
    with pytest.raises(ValueError, match="score is 'relative'; it must be 'norm' or 'per_weight'"):
        sb.WeightNormPolicy(model, THIRD, score="relative")


# State


def test_state_of_another_setting_is_refused(model, data):
    gradient = sb.GradientNormPolicy(model, THIRD, data)
    weight = sb.WeightNormPolicy(model, THIRD)
    trady = sb.TraDyPolicy(model, THIRD, data)
    for policy in (gradient, weight, trady):
        policy.step()
    others = [
        (
            gradient,
            sb.GradientNormPolicy(model, THIRD, data, score="norm"),
            "score 'norm', this one 'per_weight'",
        ),
        (gradient, sb.GradientNormPolicy(model, THIRD, data, order="smallest"), "order"),
        (gradient, sb.GradientNormPolicy(model, THIRD, data, refresh=False), "refresh"),
        (gradient, sb.GradientNormPolicy(model, THIRD, data, mode="current"), "mode"),
        (gradient, weight, "policy"),
        (weight, sb.WeightNormPolicy(model, THIRD, order="smallest"), "order"),
        (trady, sb.TraDyPolicy(model, THIRD, data, share=0.5), "share 0.5"),
        (trady, sb.TraDyPolicy(model, THIRD, data, redraw=False), "redraw"),
        (trady, sb.TraDyPolicy(model, THIRD, data, axis="out"), "axis"),
    ]
    for policy, other, words in others:
        with pytest.raises(ValueError, match=words):
            policy.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="top_layers"):
        trady.load_state_dict({**trady.state_dict(), "top_layers": ["x"]})
    assert trady.steps == 1
