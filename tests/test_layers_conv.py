"""SparseConv2d against stock Conv2d: values, gradients, saved bytes, for every option and frozen pattern."""

import pytest
import torch

import sparse_bwd as sb
from tests.cases import AXES, CONV_CASES, SELECTIONS, Case, bias_modes, channel_count
from tests.drive import check_case, embedded, gradient_of, run_ours, run_stock
from tests.tolerance import assert_close_to_oracle, assert_same_bits

BY_ID = {case.id: case for case in CONV_CASES}
FEW = [BY_ID[name] for name in ("plain", "1x1", "groups", "depthwise", "reflect", "stride-remainder")]
each_case = pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.id)
few_cases = pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
each_axis = pytest.mark.parametrize("axis", AXES)
each_selection = pytest.mark.parametrize("selection", SELECTIONS)


@each_selection
@each_axis
@each_case
def test_values_gradients_and_bytes(case: Case, axis: str, selection: str) -> None:
    index = SELECTIONS[selection](channel_count(case.stock(), axis))
    check_case(case, axis, index)


@pytest.mark.parametrize("needs_x", [True, False], ids=["x", "no-x"])
@pytest.mark.parametrize("bias", ["selected", "all", "none"])
@each_selection
@each_axis
@few_cases
def test_frozen_patterns(case: Case, axis: str, selection: str, bias: str, needs_x: bool) -> None:
    if bias not in bias_modes(axis):
        pytest.skip('on axis "in" the bias is "all" or "none"')
    index = SELECTIONS[selection](channel_count(case.stock(), axis))
    check_case(case, axis, index, bias, needs_x)


@each_axis
@few_cases
@pytest.mark.parametrize("kind", ["zero-stride", "transposed", "sliced", "channels_last"])
def test_awkward_upstream_gradients(case: Case, axis: str, kind: str) -> None:
    x, layer = case.input(), case.ours()
    index = SELECTIONS["some"](channel_count(layer, axis))
    layer.set_channels(index, axis=axis, bias="all")
    y = layer(x)
    dense = torch.ones_like(y) if kind == "zero-stride" else gradient_of(y)
    awkward = {
        "zero-stride": lambda: torch.ones(()).expand(y.shape),
        "transposed": lambda: dense.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": lambda: torch.cat([dense, dense], 1)[:, : y.shape[1]],
        "channels_last": lambda: dense.contiguous(memory_format=torch.channels_last),
    }[kind]()
    assert torch.equal(awkward, dense)
    ours = run_ours(layer, x, awkward)
    plain, oracle = run_stock(case.stock(), x, dense), run_stock(case.oracle(), x.double(), dense)
    assert_close_to_oracle(ours.dx, plain.dx, oracle.dx, "dx")
    assert_close_to_oracle(ours.db, plain.db, oracle.db, "db")
    assert_close_to_oracle(embedded(ours.dw, plain.dw, layer, index, axis), plain.dw, oracle.dw, "dw")


@few_cases
def test_sum_gives_a_zero_stride_gradient(case: Case) -> None:
    stock, layer = case.stock(), case.ours()
    stock(case.input()).sum().backward()
    layer(case.input()).sum().backward()
    oracle = case.oracle()
    oracle(case.input().double()).sum().backward()
    assert_close_to_oracle(layer.trainable_weight.grad, stock.weight.grad, oracle.weight.grad, "dw")
    assert_close_to_oracle(layer.trainable_bias.grad, stock.bias.grad, oracle.bias.grad, "db")


@each_axis
@few_cases
def test_backward_writes_into_nothing(case: Case, axis: str) -> None:
    """dy is shared by residual branches and saved tensors by other layers: a second backward must see the same."""
    x, layer = case.input().requires_grad_(), case.ours()
    layer.set_channels(SELECTIONS["some"](channel_count(layer, axis)), axis=axis, bias="all")
    y = layer(x)
    dy = gradient_of(y)
    before = (x.detach().clone(), dy.clone(), layer.weight.clone(), layer.trainable_weight.detach().clone())
    leaves = (x, layer.trainable_weight, layer.trainable_bias)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    for name, one, two in zip(("dx", "dw", "db"), first, second, strict=True):
        assert_same_bits(two, one, f"second {name}")
    after = (x, dy, layer.weight, layer.trainable_weight)
    for name, old, new in zip(("x", "dy", "weight", "trainable_weight"), before, after, strict=True):
        assert_same_bits(new.detach(), old, name)


@few_cases
def test_two_branches_share_one_gradient(case: Case) -> None:
    x = case.input()
    left, right, stock = case.ours(), case.ours(), case.stock()
    left.set_channels([0, 2])
    right.set_channels([1], axis="in", bias="all")
    x.requires_grad_()
    dy = gradient_of(left(x))
    (left(x) + right(x)).backward(dy)
    plain, oracle = run_stock(stock, x, dy), run_stock(case.oracle(), x.double(), dy)
    assert_close_to_oracle(x.grad / 2, plain.dx, oracle.dx, "dx")
    assert_close_to_oracle(right.trainable_bias.grad, plain.db, oracle.db, "db of the second branch")


@each_axis
@pytest.mark.parametrize(
    "name", ["fp64", "groups", "depthwise", "circular", "same-even-kernel", "stride-remainder"]
)
def test_gradcheck_of_x(name: str, axis: str) -> None:
    case = BY_ID[name]
    layer = case.ours().double()
    layer.set_channels(SELECTIONS["some"](channel_count(layer, axis)), axis=axis, bias="none")
    x = case.input()[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("name", ["fp64", "groups", "depthwise", "reflect"])
def test_weight_gradient_is_the_slope_of_the_output(name: str) -> None:
    """A convolution is linear in its weight: moving the weights moves <y, dy> by exactly <gradient, move>."""
    case = BY_ID[name]
    layer, moved, x = case.ours().double(), case.oracle(), case.input().double()
    y = layer(x)
    dy, leaves = gradient_of(y), (layer.trainable_weight, layer.trainable_bias)
    grads = torch.autograd.grad(y, leaves, dy)
    move = [torch.randn_like(leaf) for leaf in leaves]
    slope = sum(float((grad * step).sum()) for grad, step in zip(grads, move, strict=True))
    with torch.no_grad():
        moved.weight += move[0]
        moved.bias += move[1]
        assert abs(float(((moved(x) - y) * dy).sum()) - slope) < 1e-12 * float(y.abs().sum() * dy.abs().max())


@pytest.mark.parametrize(
    "case", [BY_ID[n] for n in ("plain", "unbatched", "circular")], ids=lambda case: case.id
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
    layer = sb.SparseConv2d(4, 6, 3, 2, 1, 1, 2, False, "zeros", device="cpu", dtype=torch.float64)
    assert (layer.stride, layer.padding, layer.groups, layer.bias) == ((2, 2), (1, 1), 2, None)
    assert layer.channels is None and layer.trainable_weight.dtype is torch.float64
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("selection", ["some", "all", "whole"])
@each_axis
@pytest.mark.parametrize("groups", [1, 2])
def test_compact_parameters_keep_channels_last(groups: int, axis: str, selection: str) -> None:
    """In a channels_last model gradients come in channels_last; the Parameter matches, so autograd copies nothing."""
    layer = sb.SparseConv2d(4, 6, 3, groups=groups).to(memory_format=torch.channels_last)
    layer.set_channels(SELECTIONS[selection](layer.num_channels(axis)), axis=axis, bias="none")
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    arrived: list[int] = []
    layer.trainable_weight.register_hook(lambda dw: arrived.append(dw.data_ptr()))
    layer(x).pow(2).sum().backward()
    assert layer.trainable_weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.trainable_weight.grad.data_ptr() == arrived[0]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_input_channels_of_one_group_of_a_grouped_1x1(layout: torch.memory_format, stride: int) -> None:
    """Where one group is touched the gradient is a plain product, but of the shape of a grouped layer."""
    layer = sb.SparseConv2d(6, 9, 1, stride=stride, groups=3, bias=False)
    layer.set_channels([2, 3], axis="in", bias="none")
    x = torch.randint(-2, 3, (3, 6, 5, 4)).float().contiguous(memory_format=layout)
    y = layer(x)
    dy = torch.randint(-2, 3, y.shape).float()
    y.backward(dy)
    dense = torch.nn.grad.conv2d_weight(x, (9, 2, 1, 1), dy, stride=stride, groups=3)
    assert_same_bits(layer.trainable_weight.grad, dense[3:6].transpose(0, 1), "dw")


@pytest.mark.parametrize("width", [1, 2])
def test_bfloat16_images_narrower_than_the_stride(width: int) -> None:
    """PyTorch's own gradient is garbage here (uninitialised memory), ours is exact: integers in, exact sums out."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-1, 2, (2, 6, 2, width), generator=generator)
        layer = sb.SparseConv2d(6, 4, 3, stride=3, padding=1, bias=False, dtype=torch.bfloat16)
        y = layer(x.bfloat16())
        dy = torch.randint(-1, 2, y.shape, generator=generator)
        y.backward(dy.bfloat16())
        exact = torch.nn.grad.conv2d_weight(x.double(), (4, 6, 3, 3), dy.double(), stride=3, padding=1)
        assert_same_bits(layer.trainable_weight.grad, exact.bfloat16(), "dw")
