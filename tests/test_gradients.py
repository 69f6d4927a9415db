"""Gradient norms of channels equal those of dense autograd; what a channel costs in weights and input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_bwd as sb
from sparse_bwd.selection.costs import CostTable, cost_table
from sparse_bwd.selection.gradients import GradientMeter
from sparse_bwd.selection.weights import channel_norms, weight_norms
from tests.networks import tiny_net
from tests.small import Batches, Small, batches, small_net, train
from tests.tolerance import assert_close_to_oracle


def slow_norms(values: Tensor, groups: int, axis: str) -> Tensor:
    """Channel by channel, from the definition: input channel c meets the rows of its group only."""
    if axis == "out":
        return torch.stack([row.square().sum().sqrt() for row in values])
    rows, width = values.shape[0] // groups, values.shape[1]
    found = []
    for channel in range(groups * width):
        group, column = divmod(channel, width)
        found.append(values[group * rows : (group + 1) * rows, column].square().sum().sqrt())
    return torch.stack(found)


def dense_norms(plain: nn.Module, data: Batches, axis: str, names: tuple[str, ...]) -> Tensor:
    """The same with dense autograd on the stock network: mean over the batches of the norms."""
    total: Any = 0
    dtype = next(plain.parameters()).dtype
    for x, y in data:
        plain.zero_grad()
        F.cross_entropy(plain(x.to(dtype)), y).backward()
        modules = dict(plain.named_modules())
        parts = []
        for name in names:
            module = modules[name]
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            parts.append(slow_norms(module.weight.grad.double(), groups, axis))
        total = total + torch.cat(parts)
    return total / len(data)


def assert_equals_dense(net: nn.Module, plain: nn.Module, data: Batches, axis: str, mode: str) -> None:
    table = cost_table(net, axis)
    got = GradientMeter(data, F.cross_entropy, mode).norms(net, table)
    assert_are_dense(got, table, plain, data, axis, mode)


def assert_are_dense(
    got: Tensor, table: CostTable, plain: nn.Module, data: Batches, axis: str, mode: str
) -> None:
    assert got.dtype == torch.float64 and len(got) == len(table)
    if mode == "eval":
        plain.eval()
    want = dense_norms(copy.deepcopy(plain).double(), data, axis, table.names)
    theirs = dense_norms(copy.deepcopy(plain), data, axis, table.names)
    assert_close_to_oracle(got.float(), theirs.float(), want, "gradient norms")
    assert bool((got > 0).any())


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("norms", ["frozen", "bias", "train"])
@pytest.mark.parametrize("make", [Small, tiny_net], ids=["small", "chains"])
def test_norms_equal_those_of_dense_autograd(make: Callable[[], nn.Module], norms: str, axis: str):
    """Dense, depthwise and grouped convolutions, Linear, chains; whatever was selected before."""
    torch.manual_seed(1)
    plain = make()
    net = copy.deepcopy(plain)
    sb.convert(net, norms)
    sb.RandomPolicy(net, sb.Budget(fraction=0.3), axis=axis).step()
    assert_equals_dense(net, plain, batches(3), axis, "eval")


def test_norms_in_training_mode_are_of_batch_statistics():
    torch.manual_seed(1)
    plain = tiny_net().train()
    net = copy.deepcopy(plain)
    sb.convert(net, "train")
    assert_equals_dense(net.train(), plain, batches(2), "in", "current")


def test_trained_values_count():
    """After training the gradient is taken at the trained weights, also where they wait in compact Parameters."""
    net = small_net()
    sb.RandomPolicy(net, sb.Budget(fraction=0.5)).step()
    train(net, 0)
    table, data = cost_table(net, "out"), batches(1, size=6)
    got = GradientMeter(data, F.cross_entropy).norms(net, table)  # before anything else reads the weights
    plain = sb.restore(copy.deepcopy(net))
    for layer in plain.modules():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
    assert_are_dense(got, table, plain, data, "out", "eval")


def test_a_layer_that_is_called_twice_and_one_that_is_not():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(torch.relu(self.conv(x))).mean((2, 3)))

    torch.manual_seed(0)
    plain = Twice()
    net, data = copy.deepcopy(plain), batches(1)
    sb.convert(net)
    table = cost_table(net, "in")
    meter = GradientMeter(data, F.cross_entropy)
    got = meter.norms(net, table)
    assert meter.unmeasured == ("unused",)
    want, theirs = (dense_norms(p, data, "in", ("conv",)) for p in (copy.deepcopy(plain).double(), plain))
    assert_close_to_oracle(got[:3].float(), theirs.float(), want)
    assert got[3:].tolist() == [0.0] * 3
    space = meter.space(net, table)
    assert space.tolist() == [3 + 2 * 144.0] * 3 + [4.0] * 3


@pytest.mark.parametrize("axis", ["out", "in"])
def test_space_is_weights_plus_the_share_of_the_input(axis: str):
    torch.manual_seed(1)
    net = Small()
    sb.convert(net)
    table = cost_table(net, axis)
    space = GradientMeter(batches(2), F.cross_entropy).space(net, table)
    inputs = {"stem": 3 * 144, "depth": 8 * 144, "grouped": 8 * 144, "hidden": 12}
    weights = {
        "out": {"stem": 27, "depth": 9, "grouped": 4, "hidden": 12},
        "in": {"stem": 72, "depth": 9, "grouped": 6, "hidden": 6},
    }
    for name, part in zip(table.names, space.split(table.sizes), strict=True):
        assert part.tolist() == [weights[axis][name] + inputs[name] / len(part)] * len(part), name
    if axis == "in":  # TraDy's C^A: H W per input channel, 1 of a Linear
        assert (space - table.cost).unique().tolist() == [1.0, 144.0]


def test_space_of_inputs_without_a_batch():
    """[C, H, W] of a convolution and [F] of a Linear are one image."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(0), nn.Linear(4 * 9, 6), nn.Linear(6, 3))
    sb.convert(net)
    meter = GradientMeter((torch.randn(2, 5, 5), torch.tensor(1)), F.cross_entropy)
    table = cost_table(net, "in")
    assert meter.space(net, table).tolist() == [36 + 25.0] * 2 + [6 + 1.0] * 36
    assert bool((meter.norms(net, table) > 0).any())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_weight_norms_are_those_of_the_slices(groups: int, axis: str):
    torch.manual_seed(0)
    conv = sb.SparseConv2d(4, 8, 3, groups=groups)
    want = slow_norms(conv.weight.detach().double(), groups, axis)
    theirs = channel_norms(conv.weight.detach(), groups, axis).float()
    assert_close_to_oracle(weight_norms(conv, axis).float(), theirs, want)
    assert len(want) == conv.num_channels(axis)
    linear = sb.SparseLinear(3, 5)
    dim = 1 if axis == "out" else 0
    assert_close_to_oracle(
        weight_norms(linear, axis).float(),
        linear.weight.detach().norm(dim=dim),
        linear.weight.detach().double().norm(dim=dim),
    )
