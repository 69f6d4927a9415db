"""NEq: which channels are at equilibrium, by threshold, share and pinning; from responses and from weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.selection.weights import WeightMeter
from tests.small import Small, small_net, train, trained
from tests.tolerance import assert_same_bits


@pytest.fixture
def model() -> nn.Module:
    return small_net()


@pytest.fixture
def probe() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def chosen(policy: sb.NEqPolicy) -> list[bool]:
    """Which rows of the table are selected."""
    flags = {name: [False] * size for name, size in policy.table.channels.items()}
    for name, channels in policy.selection.items():
        for i in channels.index.tolist():
            flags[name][i] = True
    return [flag for name in policy.table.names for flag in flags[name]]


class Told:
    """A meter that gives the similarities of a test, one row after the other."""

    bytes, unmeasured = 0, ()

    def __init__(self, rows: list[list[float]], sizes: dict[str, int]) -> None:
        self.rows, self.sizes = [torch.tensor(row, dtype=torch.float64) for row in rows], sizes

    def measure(self, model: nn.Module, channels: Any, axis: str, probe: Any) -> dict[str, Tensor]:
        return dict(zip(self.sizes, self.rows.pop(0).split(list(self.sizes.values())), strict=True))


def tiny() -> nn.Module:
    """Two layers, of 2 and 3 outputs."""
    net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3), nn.Linear(3, 2))
    sb.convert(net)
    return net


def told(phi: list[list[float]], **kwargs: Any) -> list[list[bool]]:
    """The selections of NEq on given similarities."""
    policy = sb.NEqPolicy(tiny(), torch.ones(1, 4), **kwargs)
    policy.meter = Told(phi, policy.table.channels)
    found = []
    for _ in range(len(phi)):
        policy.step()
        found.append(chosen(policy))
    return found


ONES = [1.0] * 5


def test_the_threshold_freezes_what_has_settled():
    """At equilibrium: |v| <= threshold, after one measurement and after two, in both recursions."""
    phi = [ONES, [0.5, 0.75, 1.0, 0.75, 1.0], [0.25, 0.75, 1.0, 1.0, 0.5]]
    # v_1 = (-0.5, -0.25, 0, -0.25, 0); v_2 = v_1 / 2 + dphi_2 - dphi_1 = (0, 0.125, 0, 0.375, -0.5)
    first = [True] * 5
    assert told(phi, threshold=0.25) == [
        first,
        [True, False, False, False, False],
        [False, False, False, True, True],
    ]
    assert told(phi, threshold=0.0) == [
        first,
        [True, True, False, True, False],
        [False, True, False, True, True],
    ]
    assert told(phi, threshold=0.125, recursion="paper") == [
        first,
        [True, True, False, True, False],
        [False, False, False, True, True],  # v_2 = dphi_2 - v_1 / 2 = (0, 0.125, 0, 0.375, -0.5)
    ]
    assert told(phi, threshold=0.25, mu=0.0)[2] == [
        False,
        False,
        False,
        True,
        True,
    ]  # (0.25, 0.25, 0, 0.5, -0.5)


def test_pinning_is_for_good():
    phi = [ONES, [0.5, 0.75, 1.0, 0.75, 1.0], [0.25, 0.75, 1.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0]]
    free, pinned = told(phi, threshold=0.25), told(phi, threshold=0.25, pin=True)
    assert free[1] == pinned[1] and free[3] != pinned[3]
    assert free[2] == [False, False, False, True, True] and not any(pinned[2])
    assert any(free[3]) and not any(pinned[3])


@pytest.mark.parametrize(
    ("top", "counts"), [(0.0, (0, 0)), (0.1, (1, 1)), (0.5, (1, 2)), (0.67, (2, 3)), (1.0, (2, 3))]
)
def test_top_trains_a_share_of_each_layer(top, counts):
    """C - int(C (1 - top)) channels of each layer, of the largest |velocity|; the sign does not count."""
    found = told([ONES, [0.9, 0.4, 0.8, 1.3, 0.95]], top=top)[1]
    assert (sum(found[:2]), sum(found[2:])) == counts
    assert all(found[row] for row in [1, 0][: counts[0]] + [3, 2, 4][: counts[1]])


def test_top_counts_decimals_as_they_are_written():
    """0.7 of 10 channels are 7, though 10 * 0.7 is above 7 in floats; equal velocities: the first channels."""
    net = nn.Sequential(nn.Linear(2, 10), nn.Linear(10, 2))
    sb.convert(net)
    policy = sb.NEqPolicy(net, torch.ones(1, 2), top=0.7)
    policy.step()
    policy.step()
    assert chosen(policy) == [True] * 7 + [False] * 3


def test_warm_up_selects_everything(model, probe):
    policy = sb.NEqPolicy(model, probe, warmup=3, threshold=1e9)
    for step in range(3):
        assert policy.step().cost(model) == policy.table.total
        train(model, step)
    assert policy.step() == sb.Selection()
    assert policy.report.cost == 0 and policy.report.budget is None
    own = sb.NEqPolicy(model, probe, first={"0": [1, 2]})
    assert own.step() == sb.Selection({"0": [1, 2]})


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("measure", ["exact", "sketch"])
def test_its_velocity_is_that_of_the_velocity_policy(model, probe, axis, measure):
    policy = sb.NEqPolicy(model, probe, axis=axis, measure=measure, threshold=1e-3)
    twin_model = small_net()
    twin = sb.VelocityPolicy(
        twin_model, sb.Budget(fraction=1.0), probe, axis, "reference", first="full", measure=measure
    )
    for step in range(4):
        selection = policy.step()
        twin.step()
        sb.apply(twin_model, selection)
        if step:
            assert_same_bits(policy.velocity.value, twin.velocity.value)
            assert chosen(policy) == (twin.velocity.value.abs() > 1e-3).tolist()
        for net in (model, twin_model):
            train(net, step)
    assert policy.report.velocity_bytes == twin.report.velocity_bytes > 0


def test_what_stands_still_is_frozen(model, probe):
    """Without training all velocities are zero, and the threshold 0 freezes everything, not more."""
    policy = sb.NEqPolicy(model, probe, threshold=0.0)
    policy.step()
    assert policy.step() == sb.Selection() and trained(model) == {}
    with torch.no_grad():
        sb.layers(model)["7"].weight[3] += 1.0
    assert policy.step() == sb.Selection({"7": [3]})


# Weights


@pytest.mark.parametrize("axis", ["out", "in"])
def test_weights_instead_of_responses(axis):
    """phi is the cosine of successive weights; channels that were not trained have exactly 1."""
    torch.manual_seed(2)
    net = Small()
    sb.convert(net)
    policy = sb.NEqPolicy(net, measure="weights", axis=axis)
    policy.step()
    before = {name: layer.weight.detach().clone() for name, layer in sb.layers(net).items()}
    sb.apply(net, {"stem": sb.Channels([0, 2], axis), "grouped": sb.Channels([1], axis)})
    x = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(sb.trainable_parameters(net), lr=0.5)
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    policy.step()
    want = []
    for name, layer in sb.layers(net).items():
        now, old, groups = layer.weight.detach().double(), before[name].double(), getattr(layer, "groups", 1)
        rows, width = now.shape[0] // groups, now.shape[1]
        for c in range(layer.num_channels(axis)):
            g, column = divmod(c, width)
            where = (slice(c, c + 1),) if axis == "out" else (slice(g * rows, (g + 1) * rows), column)
            a, b = now[where].flatten(), old[where].flatten()
            want.append(float(a @ b / (a.norm() * b.norm())) if not torch.equal(a, b) else 1.0)
    got = policy.velocity.phi
    assert got.tolist() == pytest.approx(want, abs=1e-14)
    assert int((got != 1.0).sum()) == 3
    assert chosen(policy) == (policy.velocity.value.abs() > 1e-3).tolist()
    weights = sum(layer.weight.numel() for layer in sb.layers(net).values())
    assert policy.velocity_bytes == 4 * weights + 24 * len(policy.table)


def test_weights_need_no_forward(model):
    def refuse(*args: Any) -> None:
        raise AssertionError("a forward ran")

    model.register_forward_pre_hook(refuse)
    policy = sb.NEqPolicy(model, measure="weights")
    policy.step()
    policy.step()


def test_weights_that_are_not_finite_are_a_sentence(model):
    policy = sb.NEqPolicy(model, measure="weights")
    policy.step()
    with torch.no_grad():
        sb.layers(model)["3"].weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"weight of layer '3' is not finite.*diverged"):
        policy.step()
    assert policy.steps == 1


# Errors and state


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"threshold": 1e-3, "top": 0.1}, ValueError, "two rules"),
        ({"threshold": -1.0}, ValueError, r"threshold is -1\.0"),
        ({"threshold": float("nan")}, ValueError, "threshold is nan"),
        ({"top": 10}, ValueError, "top is 10; it is a share"),
        ({"warmup": 0}, ValueError, "warmup is 0"),
        ({"warmup": 1.5}, ValueError, r"warmup is 1\.5"),
        ({"first": "random"}, ValueError, "first is 'random'"),
        ({"first": {"44": [0]}}, ValueError, "nearest"),
        ({"probe": None}, TypeError, "probe"),
        ({"measure": "activations"}, ValueError, "measure"),
        ({"recursion": "x"}, ValueError, "recursion"),
        ({"mu": 2}, ValueError, "mu"),
        ({"axis": "both"}, ValueError, "axis"),
    ],
)
def test_neq_refuses(model, probe, kwargs, error, words):
    with pytest.raises(error, match=words):
        sb.NEqPolicy(model, **{"probe": probe, **kwargs})


def test_state_of_another_rule_is_refused(model, probe):
    policy = sb.NEqPolicy(model, probe, pin=True)
    policy.step()
    state = policy.state_dict()
    others = [
        (sb.NEqPolicy(model, probe, threshold=0.1).state_dict(), "threshold 0.1, this one 0.001"),
        (sb.NEqPolicy(model, probe, top=0.1, pin=True).state_dict(), "threshold None"),
        (sb.NEqPolicy(model, probe).state_dict(), "pin"),
        (sb.NEqPolicy(model, probe, pin=True, warmup=2).state_dict(), "warmup"),
        (sb.NEqPolicy(model, probe, pin=True, recursion="paper").state_dict(), "recursion"),
        (sb.NEqPolicy(model, pin=True, measure="weights").state_dict(), "measure"),
        ({**state, "pinned": torch.zeros(3, dtype=torch.bool)}, "pinned"),
        ({**state, "pinned": None}, "pinned"),
    ]
    for other, words in others:
        with pytest.raises(ValueError, match=words):
            policy.load_state_dict(other)
    weights = sb.NEqPolicy(model, pin=True, measure="weights")
    for other, words in (
        (state, "holds no weights"),
        ({**weights.state_dict(), "responses": None}, "no weights"),
    ):
        with pytest.raises(ValueError, match=words):
            weights.load_state_dict(other)
    meter = WeightMeter()
    with pytest.raises(ValueError, match="'x' does not belong"):
        meter.check_state({"measure": "weights", "kept": {"x": torch.zeros(1)}}, {"0": 8})
    assert policy.steps == 1
