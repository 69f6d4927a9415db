"""Outputs made again in backward: a smooth activation or norm and its reader keep one tensor, not two."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_bwd as sb
from tests.drive import gradient_of
from tests.meter import saved_by_kind, saved_bytes
from tests.tolerance import assert_close_to_oracle, assert_same_bits

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "layer-norm": lambda: nn.LayerNorm(8),
    "rms-norm": lambda: nn.RMSNorm(8),
}
each_maker = pytest.mark.parametrize("maker", MAKERS)
each_axis = pytest.mark.parametrize("axis", ["out", "in"])
SHAPE = (3, 5, 8)
X = 4 * 3 * 5 * 8


def pair(maker: str, between: nn.Module | None = None) -> tuple[Any, nn.Module]:
    """Converted and plain: the maker, a linear layer that reads it, and whatever stands between."""
    torch.manual_seed(1)
    plain = nn.Sequential(MAKERS[maker](), between or nn.Identity(), nn.Linear(8, 6))
    ours = copy.deepcopy(plain)
    sb.convert(ours, always_train=[])
    return ours, plain


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx; parameters get theirs."""
    leaf = x.detach().clone().requires_grad_()
    y = model(leaf)
    y.backward(gradient_of(y))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def compare(ours: Any, plain: Any, x: Tensor, wrapped: nn.Module | None = None) -> None:
    """dx and dw of the pair, whose linear layer is trained whole, against the plain one."""
    exact = copy.deepcopy(plain).double()
    _, dx = gradients(plain, x)
    _, oracle = gradients(exact, x.double())
    _, our_dx = gradients(wrapped or ours, x)
    assert_close_to_oracle(our_dx, dx, oracle, "dx")
    assert_close_to_oracle(ours[2].trainable_weight.grad, plain[2].weight.grad, exact[2].weight.grad, "dw")


def rows_of(maker: str) -> int:
    return 2 * 4 * 15 if maker == "layer-norm" else 0


@pytest.mark.parametrize("index", [[1, 3], None], ids=["some", "all"])
@each_axis
@each_maker
def test_pair_keeps_one_input(maker: str, axis: str, index: list[int] | None) -> None:
    """Values and gradients of the plain pair, for the bytes of the maker alone."""
    ours, plain = pair(maker)
    bias = "all"
    ours[2].set_channels(index, axis=axis, bias=bias)
    x = torch.randn(SHAPE)
    exact = copy.deepcopy(plain).double()
    y, dx = gradients(plain, x)
    oracle = gradients(exact, x.double())
    our_y, our_dx = gradients(ours, x)
    assert_same_bits(our_y, y)
    assert_close_to_oracle(our_dx, dx, oracle[1], "dx")
    rows = slice(None) if index is None else index
    cut = (lambda w: w[rows]) if axis == "out" else (lambda w: w[:, rows])
    grads = (ours[2].trainable_weight.grad, cut(plain[2].weight.grad), cut(exact[2].weight.grad))
    assert_close_to_oracle(*grads, "dw")
    leaf = x.requires_grad_()
    _, kept, indices = saved_by_kind(lambda: ours(leaf))
    assert kept == X + rows_of(maker)
    assert indices == (0 if index is None else 8 * len(index))


@each_maker
def test_maker_behind_frozen_values_keeps_nothing(maker: str) -> None:
    """Where the input needs no gradient the maker keeps nothing, and the linear layer keeps what it reads."""
    ours, _ = pair(maker)
    ours[2].set_channels([0])
    x = torch.randn(SHAPE)
    assert saved_bytes(lambda: ours(x))[1] == X + 8


@pytest.mark.parametrize("how", ["whole", "view"])
def test_output_changed_in_place_is_kept_itself(how: str) -> None:
    class Change(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if how == "whole":
                return x.mul_(2)
            x[:, 1].add_(1)
            return x

    ours, plain = pair("layer-norm", Change())
    ours[2].set_channels(None)
    x = torch.randn(SHAPE)
    compare(ours, plain, x)
    leaf = x.requires_grad_()
    assert saved_bytes(lambda: ours(leaf))[1] == 2 * X + rows_of("layer-norm")


def test_source_changed_in_place_is_an_error() -> None:
    """As in PyTorch: what backward needs was overwritten."""
    ours, _ = pair("gelu")
    ours[2].set_channels(None)
    hidden = torch.randn(SHAPE, requires_grad=True) * 1
    y = ours(hidden)
    hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_between(p: float) -> None:
    """Dropout that drops nothing hands its input on; one that drops makes a tensor of its own."""
    ours, _ = pair("gelu", nn.Dropout(p))
    ours.train()
    ours[2].set_channels(None)
    x = torch.randn(SHAPE, requires_grad=True)
    assert saved_bytes(lambda: ours(x))[1] == (X if p == 0 else 2 * X + X // 32)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", [slice(0, 3), slice(2, 3)], ids=["both", "reader"])
def test_checkpointing(inner: slice, reentrant: bool) -> None:
    """A checkpoint around both, or around the reader alone, sees the same number of tensors twice."""
    ours, plain = pair("gelu")
    ours[2].set_channels(None)
    x = torch.randn(SHAPE)

    class Checkpointed(nn.Module):
        def __init__(self, layers: nn.Module) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[: inner.start](x)  # type: ignore[index]
            return checkpoint(self.layers[inner], x, use_reentrant=reentrant)  # type: ignore[index, no-any-return]

    compare(ours, plain, x, Checkpointed(ours))


@each_maker
def test_autocast(maker: str) -> None:
    """Under autocast a norm in float32 and a linear layer in bfloat16 still keep one tensor."""
    ours, plain = pair(maker)
    ours[2].set_channels(None)
    x = torch.randn(SHAPE)

    def run(model: nn.Module, leaf: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(leaf)
        return y

    exact = copy.deepcopy(plain).double()
    leaves = [x.clone().requires_grad_() for _ in range(2)] + [x.double().requires_grad_()]
    y = run(plain, leaves[0])
    our_y, saved = saved_bytes(lambda: run(ours, leaves[1]))
    assert saved == X + rows_of(maker)
    assert_same_bits(our_y.detach(), y.detach())
    dy = gradient_of(y)
    for output in (y, our_y, exact(leaves[2])):
        output.backward(dy.to(output.dtype))
    assert_close_to_oracle(ours[2].trainable_weight.grad, plain[2].weight.grad, exact[2].weight.grad, "dw")
    assert_close_to_oracle(leaves[1].grad, leaves[0].grad, leaves[2].grad, "dx")


def test_offloading_hooks() -> None:
    ours, plain = pair("layer-norm")
    ours[2].set_channels(None)
    x = torch.randn(SHAPE)
    with torch.autograd.graph.save_on_cpu():
        compare(ours, plain, x)


def test_nothing_outlives_the_step() -> None:
    """The note on an output makes no cycle: graph and tensors go when the loss does, without garbage collection."""
    ours, _ = pair("gelu")
    ours[2].set_channels(None)
    gc.disable()
    try:
        hidden = torch.randn(SHAPE, requires_grad=True) * 1
        seen = weakref.ref(hidden)
        y = ours(hidden)
        del hidden
        assert seen() is None or y.grad_fn is not None
        y.sum().backward()
        del y
        assert seen() is None
    finally:
        gc.enable()


@each_maker
def test_compiled(maker: str) -> None:
    """In a graph nothing is noted; values and gradients stay."""
    ours, plain = pair(maker)
    ours[2].set_channels([0, 2])
    x = torch.randn(SHAPE)
    y, dx = gradients(plain, x)
    our_y, our_dx = gradients(torch.compile(ours, backend="aot_eager", fullgraph=True), x)
    exact = gradients(copy.deepcopy(plain).double(), x.double())
    assert_close_to_oracle(our_y, y, exact[0])
    assert_close_to_oracle(our_dx, dx, exact[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_hardsigmoid(dtype: torch.dtype, layout: str) -> None:
    """One bit per element; PyTorch's values, on both edges and at NaN; its gradient takes 1/6 in float32."""
    edges = [-3.0, 3.0, float("nan"), float("inf"), float("-inf"), 2.999, -2.999, 0.0]
    values = torch.tensor([*edges, *torch.linspace(-5, 5, 22).tolist()], dtype=dtype).view(5, 6)
    values = values.t() if layout == "transposed" else values
    leaves = [values.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    y = nn.Hardsigmoid()(leaves[0])
    our_y, saved = saved_bytes(lambda: sb.Hardsigmoid()(leaves[1]))
    assert saved == 4
    y.backward(gradient_of(y))
    our_y.backward(gradient_of(y))
    assert_same_bits(our_y.detach(), y.detach())
    assert our_y.stride() == y.stride()
    exact = torch.where((values > -3) & (values < 3), gradient_of(y).double() / 6, 0)
    assert_close_to_oracle(leaves[1].grad, leaves[0].grad, exact)


@pytest.mark.parametrize("kind", ["SiLU", "Hardswish", "Hardsigmoid"])
def test_in_place_is_honoured(kind: str) -> None:
    """As the stock layer, which keeps a copy of its input; nothing is noted on what was overwritten."""
    stock, ours = getattr(nn, kind)(inplace=True), getattr(sb, kind)(inplace=True)
    leaves = [torch.linspace(-4, 4, 24).view(3, 8).requires_grad_() for _ in range(2)]
    results = []
    for layer, leaf in zip((stock, ours), leaves, strict=True):
        x = leaf * 1
        y = layer(x)
        assert y.data_ptr() == x.data_ptr()
        y.sum().backward()
        results.append(y.detach())
    assert_same_bits(results[1], results[0])
    assert_same_bits(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"]
)
@pytest.mark.parametrize("inplace", [True, False], ids=["in-place", "beside"])
@pytest.mark.parametrize("index", [[0, 2], None], ids=["some", "whole"])
def test_convolutions(
    index: list[int] | None,
    inplace: bool,
    layout: torch.memory_format,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in MobileNetV3 and EfficientNet: in place too, in a Chain, what an activation gives is free behind it."""
    if not native:
        monkeypatch.setattr("sparse_bwd.nn.conv_block.serves", lambda x: False)
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=inplace),
        nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU(inplace=inplace),
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1),
    ).to(memory_format=layout)  # fmt: skip
    ours = copy.deepcopy(plain)
    sb.convert(ours, always_train=[])
    sb.apply(ours, dict.fromkeys(("3", "6"), sb.Channels(index)))
    x = torch.randn(2, 3, 6, 5).to(memory_format=layout)
    plain.train()
    for module in plain:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    exact = copy.deepcopy(plain).double()
    y, dx = gradients(plain, x)
    oracle = gradients(exact, x.double())
    our_y, our_dx = gradients(ours, x)
    assert_close_to_oracle(our_y, y, oracle[0], "y")
    assert_close_to_oracle(our_dx, dx, oracle[1], "dx")
    rows = slice(None) if index is None else index
    for name in ("3", "6"):
        dense, wide = (net.get_parameter(f"{name}.weight").grad[rows] for net in (plain, exact))
        assert_close_to_oracle(ours.get_submodule(name).trainable_weight.grad, dense, wide, name)
    leaf = x.requires_grad_()
    pixels = 4 * 2 * 6 * 5
    kept = sb.memory.saved_bytes(lambda: ours(leaf), ours)
    # Inputs of both activations, flags of the ReLU, two scales, and indices; of a depthwise layer the native code keeps
    # the selected channels of x, PyTorch's convolution the index of them.
    k = 0 if index is None else len(index)
    slices = pixels * k if native else 0
    indices = 8 * k * (2 if native else 3)
    assert kept == pixels * (8 + 6) + -(-2 * 6 * 6 * 5 // 8) + 4 * (8 + 6) + slices + indices
