"""Velocity in chains: what follows a convolution is done in the pass that reads its response, with the same result."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_bwd as sb
from sparse_bwd.nn.chain import Chain
from sparse_bwd.ops import affine_act_response, reference
from sparse_bwd.ops.backend import forced
from sparse_bwd.selection.policies import make_meter
from tests.cases import LAYOUTS
from tests.native_calls import ACTS
from tests.tolerance import assert_same_bits
from tests.velocity_net import edit, shapes


class Counted(TorchDispatchMode):
    """Counts calls of the library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.removeprefix("sparse_bwd::")] += 1
        return func(*args, **(kwargs or {}))


def chained() -> Chain:
    """A norm with an activation, an activation alone, a norm alone, and neither."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 8, 1), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4),
        nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(5 * 4 * 4, 2),
    )  # fmt: skip
    for norm in (net[1], net[6]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    sb.convert(net)
    assert type(net) is Chain
    return net


def measured(net: nn.Module, x: Tensor, measure: str) -> tuple[dict[str, Tensor], Tensor, Counter[str]]:
    """phi after an edit, the network's output in that pass, and the operators that it called."""
    meter = make_meter(measure, None, 16, seed=0)
    outputs: list[Tensor] = []
    handle = net.register_forward_hook(lambda _m, _a, y: outputs.append(y))
    meter.measure(net, shapes(net, "out"), "out", x)
    edit(net, 1)
    with Counted() as counted:
        phi = meter.measure(net, shapes(net, "out"), "out", x)
    handle.remove()
    return phi, outputs[1], counted.calls


@pytest.mark.parametrize("measure", ["exact", "sketch"])
def test_the_same_as_step_by_step(measure: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    phi, y, calls = measured(chained(), x, measure)
    watched = chained()
    for module in watched:
        module.register_forward_pre_hook(lambda _m, _a: None)
    slow_phi, slow_y, slow_calls = measured(watched, x, measure)
    assert_same_bits(y, slow_y)
    for name in phi:
        assert_same_bits(phi[name], slow_phi[name], name)
    fused = "affine_act_response" if measure == "exact" else "affine_act_"
    assert calls[fused] == 3 and slow_calls[fused] == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_whoever_else_looks_on_sees_what_he_expects(place: int) -> None:
    """A hook on a member sees its own output, which nobody has overwritten."""
    net, seen = chained(), []
    x = torch.randn(2, 3, 8, 8)
    net[place].register_forward_hook(lambda _m, _a, y: seen.append(y))
    _, _, calls = measured(net, x, "exact")
    with torch.no_grad():
        expected = net[: place + 1](x)
    assert calls["affine_act_response"] == 2
    assert_same_bits(seen[1], expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act[0])
@pytest.mark.parametrize("kind", ["plain", None])
def test_the_operator(kind: str | None, act: tuple[str, float, float], layout: str) -> None:
    for vectors in (torch.randn(2, 5), (None, None)):
        x, previous = (LAYOUTS[layout](torch.randn(3, 5, 4, 7)) for _ in range(2))
        before, held = x.clone(), previous.clone()
        with forced(kind):
            sums = affine_act_response(x, previous, *vectors, *act)
        torch.testing.assert_close(sums, torch.stack(reference.response_ref(before, held)))
        assert_same_bits(previous, before)
        torch.testing.assert_close(x, reference.affine_act_ref(before, *vectors, *act))
