"""Lean neighbours against their stock layers: activations, max pooling and dropout."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from tests.cases import LAYOUTS
from tests.drive import gradient_of
from tests.meter import saved_bytes
from tests.tolerance import assert_same_bits

ACTIVATIONS = {
    "relu": (nn.ReLU, sb.ReLU, {}),
    "relu6": (nn.ReLU6, sb.ReLU6, {}),
    "hardtanh": (nn.Hardtanh, sb.Hardtanh, {}),
    "hardtanh-range": (nn.Hardtanh, sb.Hardtanh, {"min_val": -0.5, "max_val": 2.0}),
    "leaky": (nn.LeakyReLU, sb.LeakyReLU, {}),
    "leaky-steep": (nn.LeakyReLU, sb.LeakyReLU, {"negative_slope": 1.5}),
    "leaky-zero": (nn.LeakyReLU, sb.LeakyReLU, {"negative_slope": 0.0}),
}
each_activation = pytest.mark.parametrize("name", ACTIVATIONS)
EDGES = [0.0, -0.0, 6.0, 1.0, -1.0, 2.0, -0.5, 5.9999995, 6.0000005, 1e-45, -1e-45, 1e38, -1e38]
SPECIALS = [float("inf"), float("-inf"), float("nan")]


def pair(name: str, inplace: bool = False) -> tuple[nn.Module, nn.Module]:
    """The stock activation and ours, with the same options."""
    stock, ours, options = ACTIVATIONS[name]
    return stock(**options, inplace=inplace), ours(**options, inplace=inplace)


def run(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor | None, int]:
    """y, dx and saved bytes of a layer on a copy of x (not itself a leaf where the layer writes in place)."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y, saved = saved_bytes(lambda: layer(leaf + 0 if getattr(layer, "inplace", False) else leaf))
    out = y[0] if isinstance(y, tuple) else y
    out.backward(gradient_of(out) if dy is None else dy)
    return out.detach(), leaf.grad, saved


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Equal strides wherever a stride means anything."""
    return not a.numel() or all(
        s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1
    )


@pytest.mark.parametrize("inplace", [False, True], ids=["outside", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@each_activation
def test_activation_at_every_edge(name: str, dtype: torch.dtype, inplace: bool) -> None:
    """Boundary values belong to the side PyTorch puts them; NaN and infinities behave as there."""
    x = torch.tensor(EDGES + SPECIALS + torch.linspace(-8, 8, 30).tolist(), dtype=dtype)
    stock, ours = pair(name, inplace)
    if inplace and getattr(stock, "negative_slope", 1.0) <= 0:
        pytest.skip("PyTorch has no in-place backward for a slope of zero")
    for dy in (gradient_of(x), torch.full_like(x, float("inf")), torch.full_like(x, float("nan"))):
        y, dx, _ = run(stock, x, dy)
        our_y, our_dx, _ = run(ours, x, dy)
        assert_same_bits(our_y, y, "y")
        if isinstance(stock, nn.Hardtanh):
            # Where x is NaN, PyTorch's gradient depends on the path: vectorised CPU code gives 0, its tail and CUDA
            # pass dy on. Ours passes it on everywhere.
            dx = torch.where(x.isnan(), dy, dx)
        assert_same_bits(our_dx, dx, "dx")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "sliced"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 1, 1, 1), (2, 8, 4, 4), (3, 5, 1, 3), (0, 3, 4, 4)], ids=str
)
@each_activation
def test_activation_layouts_and_bytes(name: str, shape: tuple[int, ...], layout: str) -> None:
    """Any layout in, also another one for dy; ceil(Y / 8) bytes kept, and the tail of the last byte is right."""
    x = LAYOUTS[layout](torch.randn(shape) * 4)
    stock, ours = pair(name)
    for dy in (gradient_of(x), LAYOUTS["channels_last"](gradient_of(x)), torch.ones(()).expand(shape)):
        leaf, our_leaf = x.detach().requires_grad_(), x.detach().requires_grad_()
        y = stock(leaf)
        our_y, saved = saved_bytes(lambda leaf=our_leaf: ours(leaf))
        y.backward(dy)
        our_y.backward(dy)
        assert_same_bits(our_y.detach(), y.detach(), "y")
        assert same_layout(our_y, y)
        assert_same_bits(our_leaf.grad, leaf.grad, "dx")
        assert saved == -(-x.numel() // 8)


@each_activation
def test_activation_inplace_is_honoured(name: str) -> None:
    _, ours = pair(name, inplace=True)
    x = torch.randn(3, 5)
    held = x.clone()
    assert ours(held) is held or ours(held).data_ptr() == held.data_ptr()
    base = torch.randn(3, 5, requires_grad=True)
    middle = base + 0
    y = ours(middle)
    assert y.data_ptr() == middle.data_ptr() and middle._version > 0
    with pytest.raises(RuntimeError, match="leaf"):
        ours(base)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "dropout"])
def test_inplace_on_a_view(name: str) -> None:
    """The tensor behind the view changes too, and gradients flow through both, as in PyTorch."""
    layers = pair(name, True) if name != "dropout" else (nn.Dropout(0.5, True), sb.Dropout(0.5, True))
    if getattr(layers[0], "negative_slope", 1.0) <= 0:
        pytest.skip("PyTorch has no in-place backward for a slope of zero")
    results = []
    for layer in layers:
        torch.manual_seed(0)
        leaf = torch.randn(4, 6, requires_grad=True)
        base = leaf * 3
        part = base[1:, ::2]
        y = layer(part)
        assert y.data_ptr() == part.data_ptr()
        (base.sum() + (y * gradient_of(y)).sum()).backward()
        results.append((base.detach(), leaf.grad))
    for name, stock, ours in zip(("base", "dx"), *results, strict=True):
        assert_same_bits(ours, stock, name)


@each_activation
def test_activation_inplace_notices_a_damaged_graph(name: str) -> None:
    """Who saved the value before it was overwritten must be told at backward, as in PyTorch."""
    _, ours = pair(name, inplace=True)
    middle = torch.randn(3, 5, requires_grad=True) * 2
    squared = middle.pow(2)
    ours(middle)
    with pytest.raises(RuntimeError, match="inplace operation"):
        squared.sum().backward()


@each_activation
def test_activation_without_gradient_keeps_nothing(name: str) -> None:
    _, ours = pair(name)
    x = torch.randn(3, 5)
    y, saved = saved_bytes(lambda: ours(x))
    assert saved == 0 and not y.requires_grad
    with torch.no_grad():
        assert not ours(x.requires_grad_()).requires_grad


@each_activation
def test_activation_backward_twice(name: str) -> None:
    _, ours = pair(name)
    x = torch.randn(5, 7, requires_grad=True)
    y = ours(x)
    dy = gradient_of(y)
    kept = dy.clone()
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert_same_bits(second, first)
    assert_same_bits(dy, kept, "dy")


@pytest.mark.parametrize("name", ["relu", "relu6", "hardtanh", "leaky"])
def test_activation_gradcheck(name: str) -> None:
    _, ours = pair(name)
    x = (torch.randn(4, 5, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(ours, (x,))


POOLS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "2": ({"kernel_size": 2}, (2, 3, 6, 8)),
    "3-stride-2-pad": ({"kernel_size": 3, "stride": 2, "padding": 1}, (2, 3, 7, 9)),
    "overlap": ({"kernel_size": 3, "stride": 1}, (2, 3, 6, 6)),
    "ceil": ({"kernel_size": 3, "stride": 2, "ceil_mode": True}, (2, 3, 6, 8)),
    "ceil-pad": ({"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True}, (1, 2, 5, 6)),
    "dilated": ({"kernel_size": 2, "stride": 1, "dilation": 3}, (2, 3, 8, 7)),
    "uneven": (
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
        (2, 3, 9, 7),
    ),
    "gap": ({"kernel_size": 1, "stride": 3}, (2, 3, 7, 7)),
    "window-256": ({"kernel_size": 16, "stride": 4}, (1, 2, 20, 20)),
    "unbatched": ({"kernel_size": 2}, (3, 6, 6)),
    "empty-batch": ({"kernel_size": 2}, (0, 3, 6, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", ["random", "ties", "specials"])
@pytest.mark.parametrize("name", POOLS)
def test_max_pool(name: str, values: str, dtype: torch.dtype) -> None:
    """The same winner as PyTorch, ties, NaN and infinities included, for Y bytes."""
    options, shape = POOLS[name]
    x = torch.randn(shape) if values != "ties" else torch.randint(0, 2, shape).float()
    if values == "specials" and x.numel():
        x.view(-1)[::7] = float("nan")
        x.view(-1)[3::11] = float("-inf")
    for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        leaf = LAYOUTS[layout](x.to(dtype)).detach()
        y, dx, _ = run(nn.MaxPool2d(**options), leaf)
        our_y, our_dx, saved = run(sb.MaxPool2d(**options), leaf)
        assert_same_bits(our_y, y, "y")
        assert same_layout(our_y, y)
        assert_same_bits(our_dx, dx, "dx")
        assert saved == y.numel()


def test_max_pool_of_all_minus_infinity() -> None:
    x = torch.full((1, 1, 4, 4), float("-inf"))
    for ours, stock in zip(run(sb.MaxPool2d(2), x)[:2], run(nn.MaxPool2d(2), x)[:2], strict=True):
        assert_same_bits(ours, stock)


@pytest.mark.parametrize(
    "options", [{"kernel_size": 17, "stride": 3}, {"kernel_size": 2, "return_indices": True}]
)
def test_max_pool_falls_back(options: dict[str, Any]) -> None:
    """A window of more than 256 elements does not fit a byte, and indices must reach the caller as int64."""
    x = torch.randn(1, 2, 20, 20)
    stock, ours = nn.MaxPool2d(**options)(x), sb.MaxPool2d(**options)(x)
    for one, two in zip(stock, ours, strict=True):
        assert_same_bits(two, one)
    y, dx, _ = run(nn.MaxPool2d(**options), x)
    our_y, our_dx, _ = run(sb.MaxPool2d(**options), x)
    assert_same_bits(our_y, y)
    assert_same_bits(our_dx, dx)


def test_max_pool_of_an_image_smaller_than_the_dilation_is_stock() -> None:
    """Some windows hold padding only: PyTorch's index points outside, which no offset in a window can say."""
    x = torch.randn(1, 1, 5, 1, requires_grad=True)
    options: dict[str, Any] = {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": 2}
    y = sb.MaxPool2d(**options)(x)
    assert type(y.grad_fn).__name__ == type(nn.MaxPool2d(**options)(x).grad_fn).__name__
    assert_same_bits(y.detach(), nn.MaxPool2d(**options)(x).detach())


def test_max_pool_refuses_what_pytorch_refuses() -> None:
    for options, shape in (
        ({"kernel_size": 2, "padding": 2}, (1, 1, 5, 5)),
        ({"kernel_size": 9}, (1, 1, 5, 5)),
    ):
        for layer in (nn.MaxPool2d, sb.MaxPool2d):
            with pytest.raises(RuntimeError):
                layer(**options)(torch.randn(shape, requires_grad=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_dropout_draws_the_mask_of_pytorch(p: float, dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(3, 5, 4, 7).to(dtype))
    dy = gradient_of(x)
    results = []
    for layer in (nn.Dropout(p), sb.Dropout(p)):
        torch.manual_seed(5)
        leaf = x.detach().requires_grad_()
        y, saved = saved_bytes(lambda leaf=leaf, layer=layer: layer(leaf))
        y.backward(dy)
        results.append((y.detach(), leaf.grad, torch.rand(())))
    for name, stock, ours in zip(("y", "dx", "generator"), *results, strict=True):
        assert_same_bits(ours, stock, name)
    assert saved == -(-x.numel() // 8) if 0 < p < 1 else saved <= x.element_size()


def test_dropout_in_eval_and_inplace() -> None:
    x = torch.randn(4, 6)
    layer = sb.Dropout(0.5).eval()
    y, saved = saved_bytes(lambda: layer(x.clone().requires_grad_()))
    assert saved == 0
    assert_same_bits(y.detach(), x)
    results = []
    for layer in (nn.Dropout(0.4, inplace=True), sb.Dropout(0.4, inplace=True)):
        leaf = x.clone().requires_grad_()
        held = leaf + 0
        torch.manual_seed(1)
        y, saved = saved_bytes(lambda layer=layer, held=held: layer(held))
        assert y.data_ptr() == held.data_ptr() and held._version > 0
        y.backward(gradient_of(y))
        results.append((y.detach(), leaf.grad))
    assert saved == 3
    for stock, ours in zip(*results, strict=True):
        assert_same_bits(ours, stock)
    with pytest.raises(ValueError):
        sb.Dropout(1.5)


def test_copies_behave_like_their_originals() -> None:
    x = torch.randn(2, 3, 6, 6)
    for layer in (sb.ReLU(), sb.ReLU6(), sb.Hardtanh(), sb.LeakyReLU(0.2), sb.MaxPool2d(2)):
        assert_same_bits(copy.deepcopy(layer)(x), layer(x))
        assert isinstance(layer, type(layer).__mro__[1]) and repr(layer) == repr(copy.deepcopy(layer))
