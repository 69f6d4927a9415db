"""SparseLinear against stock Linear: values, gradients, saved bytes, for every shape and frozen pattern."""

import pytest
import torch

import sparse_bwd as sb
from tests.cases import AXES, LINEAR_CASES, SELECTIONS, Case, bias_modes, channel_count
from tests.drive import check_case, embedded, gradient_of, run_ours, run_stock
from tests.tolerance import assert_close_to_oracle, assert_same_bits

BY_ID = {case.id: case for case in LINEAR_CASES}
FEW = [BY_ID[name] for name in ("plain", "tokens", "transposed-tokens")]
few_cases = pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
each_axis = pytest.mark.parametrize("axis", AXES)
each_selection = pytest.mark.parametrize("selection", SELECTIONS)


@each_selection
@each_axis
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.id)
def test_values_gradients_and_bytes(case: Case, axis: str, selection: str) -> None:
    check_case(case, axis, SELECTIONS[selection](channel_count(case.stock(), axis)))


@pytest.mark.parametrize("needs_x", [True, False], ids=["x", "no-x"])
@pytest.mark.parametrize("bias", ["selected", "all", "none"])
@each_selection
@each_axis
@few_cases
def test_frozen_patterns(case: Case, axis: str, selection: str, bias: str, needs_x: bool) -> None:
    if bias not in bias_modes(axis):
        pytest.skip('on axis "in" the bias is "all" or "none"')
    check_case(case, axis, SELECTIONS[selection](channel_count(case.stock(), axis)), bias, needs_x)


@each_axis
@few_cases
@pytest.mark.parametrize("kind", ["zero-stride", "transposed", "sliced"])
def test_awkward_upstream_gradients(case: Case, axis: str, kind: str) -> None:
    x, layer = case.input(), case.ours()
    index = SELECTIONS["some"](channel_count(layer, axis))
    layer.set_channels(index, axis=axis, bias="all")
    y = layer(x)
    dense = torch.ones_like(y) if kind == "zero-stride" else gradient_of(y)
    awkward = {
        "zero-stride": lambda: torch.ones(()).expand(y.shape),
        "transposed": lambda: dense.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda: torch.cat([dense, dense], -1)[..., : y.shape[-1]],
    }[kind]()
    assert torch.equal(awkward, dense)
    ours = run_ours(layer, x, awkward)
    plain, oracle = run_stock(case.stock(), x, dense), run_stock(case.oracle(), x.double(), dense)
    assert_close_to_oracle(ours.dx, plain.dx, oracle.dx, "dx")
    assert_close_to_oracle(ours.db, plain.db, oracle.db, "db")
    assert_close_to_oracle(embedded(ours.dw, plain.dw, layer, index, axis), plain.dw, oracle.dw, "dw")


@each_axis
@few_cases
def test_backward_writes_into_nothing(case: Case, axis: str) -> None:
    x, layer = case.input().requires_grad_(), case.ours()
    layer.set_channels(SELECTIONS["some"](channel_count(layer, axis)), axis=axis, bias="all")
    y = layer(x)
    dy = gradient_of(y)
    before = (x.detach().clone(), dy.clone(), layer.weight.clone())
    leaves = (x, layer.trainable_weight, layer.trainable_bias)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    for name, one, two in zip(("dx", "dw", "db"), first, second, strict=True):
        assert_same_bits(two, one, f"second {name}")
    for name, old, new in zip(("x", "dy", "weight"), before, (x, dy, layer.weight), strict=True):
        assert_same_bits(new.detach(), old, name)


@each_axis
@pytest.mark.parametrize("name", ["fp64", "tokens"])
def test_gradcheck_of_x(name: str, axis: str) -> None:
    case = BY_ID[name]
    layer = case.ours().double()
    layer.set_channels(SELECTIONS["some"](channel_count(layer, axis)), axis=axis, bias="none")
    assert torch.autograd.gradcheck(layer, (case.input().double().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize(
    "case", [BY_ID[n] for n in ("plain", "tokens", "four-axes", "unbatched")], ids=lambda case: case.id
)
def test_output_may_be_overwritten(case: Case) -> None:
    """`x = layer(x); x += other` is legal on a stock layer, so also here, whatever the number of dimensions."""
    results = []
    for layer in (case.stock(), case.ours()):
        x = case.input().requires_grad_()
        y = layer(x)
        y += 1
        y.relu_().backward(gradient_of(y))
        results.append((y.detach(), x.grad))
    assert_same_bits(results[1][0], results[0][0], "y")
    assert_same_bits(results[1][1], results[0][1], "dx")


def test_constructor_takes_what_the_stock_layer_takes() -> None:
    layer = sb.SparseLinear(4, 6, False, device="cpu", dtype=torch.float64)
    assert layer.bias is None and layer.trainable_weight.dtype is torch.float64
    assert list(layer.state_dict()) == ["weight"]
