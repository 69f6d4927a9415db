"""PyTorch's FLOP counter knows every operator, and counts what the library's own formulas say."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import sparse_bwd as sb
from sparse_bwd.measure import flop_formulas, kernels
from sparse_bwd.measure.kernels import Setting
from sparse_bwd.measure.networks import Conv, Linear
from sparse_bwd.selection.flops import backward_flops
from tests.networks import batch, converted_net, drawn_selection

OPERATORS = sorted(
    name.partition("::")[2]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("sparse_bwd::")
)
SMALL = Setting(batch=3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_formula(operator: str) -> None:
    assert getattr(torch.ops.sparse_bwd, operator) in flop_registry


def test_operators_without_products_are_those_that_count_nothing() -> None:
    counted = {"linear_dw", "linear_dw_statistics", "conv2d_dw"}
    assert set(flop_formulas.NO_PRODUCT) == set(OPERATORS) - counted


def counted(call: kernels.Call) -> int:
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.sparse_bwd, call.operator)(*call.arguments("cpu"))
    return counter.get_total_flops()


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(
    "layer",
    [Conv(4, 6, 3, 2, 1, 7, ""), Conv(6, 6, 3, 1, 6, 5, ""), Conv(4, 8, 1, 1, 1, 5, ""), Conv(4, 8, 3, 1, 2, 5, "")],
    ids=str,
)  # fmt: skip
def test_convolutions_count_as_the_roofline_does(layer: Conv, share: float, axis: str) -> None:
    call = kernels.conv2d_dw(layer, share, SMALL, axis)
    assert counted(call) == call.work.operations > 0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_linear_layers_count_their_product(share: float) -> None:
    layer = Linear(6, 8, 5)
    call, k, m = kernels.linear_dw(layer, share, SMALL), round(8 * share), 15
    assert counted(call) == call.work.operations - m * k  # less the sum of the bias
    assert counted(kernels.linear_dw_statistics(layer, share, SMALL)) == counted(call)


def test_sums_and_copies_count_nothing() -> None:
    calls = [
        kernels.response(4, 5, SMALL),
        kernels.affine_act(4, 5, "relu", SMALL),
        kernels.write_back([Conv(4, 8, 1, 1, 1, 5, "")], 0.5, SMALL, "one"),
    ]
    assert [counted(call) for call in calls] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_a_backward_counts_what_the_selection_costs(seed: int) -> None:
    """Native blocks step aside: the counter sees each operator, and comes to the library's own count."""
    model, (x, y) = converted_net(), batch()
    sb.apply(model, drawn_selection(seed))
    with FlopCounterMode(display=False) as forward:
        loss = F.cross_entropy(model(x), y)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() > 0
    assert backward.get_total_flops() == sum(backward_flops(model, None, x).values()) > 0


def test_dense_and_ours_are_counted_alike() -> None:
    """Everything selected costs what dense costs. Without groups: PyTorch counts their dw as if there were none."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(200, 6), nn.Linear(6, 5)
    )  # fmt: skip
    model, (x, y) = copy.deepcopy(plain), batch()
    sb.convert(model)
    sb.apply(model, {name: sb.Channels(None) for name in ("0", "2", "4")})
    assert total(model, x, y) == total(plain, x, y) > 0


def total(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x), y).backward()
    return counter.get_total_flops()


def test_importing_the_library_does_not_import_the_counter() -> None:
    code = "import sys, sparse_bwd; sys.exit('torch.utils.flop_counter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
