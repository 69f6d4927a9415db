"""The velocity policy: ranking, first selection, probe, errors."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchvision
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.costs import greedy_prefix
from sparse_bwd.selection.schemes import Scheme
from tests.small import small_net, train, trained


@pytest.fixture
def model() -> nn.Module:
    return small_net()


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("order", ["fastest", "slowest"])
def test_velocity_ranks_by_speed_per_weight(model, probe, axis, order):
    policy = sb.VelocityPolicy(
        model, sb.Budget(fraction=0.3), probe=probe, axis=axis, order=order, first="full"
    )
    assert policy.step().cost(model) == policy.table.total
    train(model, 0)
    selection = policy.step()
    speed = policy.velocity.value.abs() / policy.table.cost
    assert bool((speed > 0).any())
    chosen = torch.zeros(len(speed), dtype=torch.bool)
    starts = dict(
        zip(policy.table.names, torch.tensor([0, *policy.table.sizes[:-1]]).cumsum(0).tolist(), strict=True)
    )
    for name, channels in selection.items():
        chosen[starts[name] + channels.index] = True
    inside, outside = speed[chosen], speed[~chosen]
    if order == "fastest":
        assert inside.min() >= outside.max()
    else:
        assert inside.max() <= outside.min()
    assert 0.3 * policy.table.total - int(policy.table.cost.max()) < selection.cost(model) <= policy.budget
    assert policy.report.velocity_bytes == policy.velocity_bytes > 0


@pytest.mark.parametrize("axis", ["out", "in"])
def test_a_sketch_with_a_number_for_every_value_selects_what_exact_velocity_does(probe, axis):
    chosen = []
    for measure in ("exact", "sketch"):
        net = small_net()
        policy = sb.VelocityPolicy(
            net, sb.Budget(fraction=0.3), probe, axis, measure=measure, numbers=4 * 37, storage=torch.float64
        )
        chosen.append([])
        for step in range(3):
            chosen[-1].append(policy.step())
            train(net, step)
    assert chosen[0] == chosen[1] and chosen[0][1] != chosen[0][2]


def test_the_bytes_of_a_sketch_are_those_of_its_numbers(model):
    for probe in (torch.randn(2, 3, 6, 6), torch.randn(5, 3, 12, 9)):
        policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe, measure="sketch", numbers=5)
        policy.step()
        assert policy.report.velocity_bytes == policy.velocity_bytes == len(policy.table) * (5 * 2 + 3 * 8)


def test_velocity_first_selection(model, probe):
    budget = sb.Budget(fraction=0.3)
    assert (
        sb.VelocityPolicy(model, budget, probe, seed=4).step()
        == sb.RandomPolicy(model, budget, seed=4).step()
    )
    chosen = {"0": [1, 2], "4": [0]}
    assert sb.VelocityPolicy(model, budget, probe, first=chosen).step() == sb.Selection(chosen)
    scheme = Scheme("own", 3, 1, (2,), (0.5,))
    for axis in ("out", "in"):
        want = sb.SparseUpdatePolicy(model, scheme, axis=axis).step()
        assert sb.VelocityPolicy(model, budget, probe, axis=axis, first=scheme).step() == want
    with pytest.raises(ValueError, match="nearest"):
        sb.VelocityPolicy(model, budget, probe, first={"44": [0]})
    with pytest.raises(ValueError, match="52 convolutions; the model has 3"):
        sb.VelocityPolicy(model, budget, probe, first="mbv2-1")
    with pytest.raises(ValueError, match="no scheme"):
        sb.VelocityPolicy(model, budget, probe, first="randm")


def test_parity_drops_ties(model, probe):
    """With nothing trained all velocities are zero, and the first rejected channel ties with all."""
    for parity in (False, True):
        policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe, parity=parity)
        policy.step()
        if parity:
            with pytest.warns(UserWarning, match="ties with one that does not fit"):
                assert not policy.step()
        else:
            assert policy.step()
    rows = greedy_prefix(torch.tensor([2.0, 1.0, 1.0, 1.0]), torch.tensor([1, 1, 1, 1]), 2, parity=True)
    assert rows.tolist() == [0]


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"probe": torch.zeros(0, 3, 6, 6)}, ValueError, "empty"),
        ({"probe": ()}, ValueError, "empty"),
        ({"probe": None}, TypeError, "probe"),
        ({"axis": "both"}, ValueError, "axis"),
        ({"bias": "some"}, ValueError, "bias"),
        ({"order": "fast"}, ValueError, "order"),
        ({"recursion": "x"}, ValueError, "recursion"),
        ({"mu": 2}, ValueError, "mu"),
        ({"storage": torch.int8}, ValueError, "storage"),
        ({"storage": torch.int8, "measure": "sketch"}, ValueError, "storage"),
        ({"measure": "exactly"}, ValueError, "measure"),
        ({"measure": "sketch", "numbers": 0}, ValueError, "numbers"),
    ],
)
def test_velocity_refuses(model, probe, kwargs, error, words):
    with pytest.raises(error, match=words):
        sb.VelocityPolicy(model, sb.Budget(fraction=0.3), **{"probe": probe, **kwargs})


def test_divergence_is_an_error(model, probe):
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=0.3), probe)
    before = policy.step()
    with torch.no_grad():
        sb.layers(model)["3"].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"'3'.*diverged"):
        policy.step()
    assert policy.selection == before and trained(model) == {n: c.index.tolist() for n, c in before.items()}


def test_pending_gradients_leave_the_policy_as_it_was(model, probe):
    policy, twin = (sb.VelocityPolicy(net, sb.Budget(fraction=0.3), probe) for net in (model, small_net()))
    for one in (policy, twin):
        one.step()
        train(one.model, 0)
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
    model(probe).sum().backward()
    with pytest.raises(ValueError, match="gradient"):
        policy.step(optimizer)
    optimizer.zero_grad()
    assert policy.step(optimizer) == twin.step()


def test_velocity_on_mobilenet_v2_in_its_chains():
    """Hooks see the convolutions of fused chains, whose outputs are overwritten in a training step."""
    torch.manual_seed(0)
    net = torchvision.models.mobilenet_v2(weights=None)
    plain_net = torchvision.models.mobilenet_v2(weights=None)
    plain_net.load_state_dict(net.state_dict())
    sb.convert(net)
    probe = torch.randn(2, 3, 64, 64)
    found = {}
    for name, module in plain_net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, a, output, name=name: found.__setitem__(name, output.detach().clone())
            )
    with torch.no_grad():
        plain_net.eval()(probe)
    policy = sb.VelocityPolicy(net, sb.Budget(params=192_311), probe, measure="exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.step()
    assert policy.report.unmeasured == () and set(policy.meter.kept) == set(found)
    for name, output in found.items():
        torch.testing.assert_close(policy.meter.kept[name][0], output, rtol=1e-3, atol=1e-4)
    outputs = sum(output.numel() * 4 for output in found.values())
    assert policy.velocity_bytes == outputs + 3 * 8 * len(policy.table)
    assert 192_311 - 960 <= policy.report.cost <= 192_311


def test_layers_that_the_probe_does_not_call_are_reported(probe):
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.used(x).mean((2, 3)))

    net = Unused()
    sb.convert(net)
    policy = sb.VelocityPolicy(net, sb.Budget(params=12), probe)
    for _ in range(2):
        policy.step()
        assert policy.report.unmeasured == ("unused",)
        assert "1 layers not called by the probe" in str(policy.report)
        train(net, 0)
    assert list(policy.selection) == ["used"]  # the other layer has no velocity
