"""Runs one layer case through plain PyTorch, an fp64 oracle and the library, and compares everything that comes out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.masked import compact, is_depthwise
from tests.cases import Case
from tests.meter import saved_by_kind
from tests.tolerance import assert_close_to_oracle, assert_same_bits


@dataclass
class Result:
    """Output and gradients of one layer; what was not asked for is None. `dw` and `db` have the layer's own shape."""

    y: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    saved: int = 0
    indices: int = 0


def gradient_of(y: Tensor, seed: int = 3) -> Tensor:
    """A random upstream gradient for an output, the same on every call."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)


def run_stock(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> Result:
    """Forward and backward of a plain layer, everything trained; `dy` None draws one."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(gradient_of(y) if dy is None else dy.to(y.dtype))
    bias = layer.bias
    return Result(y.detach(), x.grad, layer.weight.grad, None if bias is None else bias.grad)  # type: ignore[union-attr, arg-type]


def run_ours(layer: Any, x: Tensor, dy: Tensor | None = None, needs_x: bool = True) -> Result:
    """Forward and backward of a sparse layer with what it has selected; `dw` and `db` are compact."""
    x = x.detach().requires_grad_(needs_x)
    y, saved, indices = saved_by_kind(lambda: layer(x), layer.buffers())
    if y.requires_grad:
        y.backward(gradient_of(y) if dy is None else dy)
    rows, shift = layer.trainable_weight, layer.trainable_bias
    assert layer.weight.grad is None, "the full weight got a gradient"
    assert layer.bias is None or layer.bias.grad is None, "the full bias got a gradient"
    dw, db = (None if p is None else p.grad for p in (rows, shift))
    return Result(y.detach(), x.grad, dw, db, saved, indices)


def embedded(rows: Tensor, full: Tensor, layer: Any, index: list[int] | None, axis: str) -> Tensor:
    """A full gradient whose selected slices are replaced by compact ones, to be judged on one scale."""
    places = compact(torch.arange(full.numel()).view(full.shape), layer, index, axis)
    assert rows.shape == places.shape, f"compact gradient {tuple(rows.shape)}, expected {tuple(places.shape)}"
    assert rows.dtype == full.dtype, f"compact gradient is {rows.dtype}, PyTorch's is {full.dtype}"
    flat = full.flatten().clone()
    flat[places.flatten()] = rows.flatten()
    return flat.view(full.shape)


def bias_index(layer: Any, index: list[int] | None, mode: str) -> list[int] | None:
    """The trained entries of a bias; [] when none is."""
    if mode == "none" or layer.bias is None:
        return []
    return index if mode == "selected" else None


def assert_gradients(
    ours: Result, plain: Result, oracle: Result, layer: Any, index: list[int] | None, axis: str, bias: str
) -> None:
    """Compare dx, dw and db of a sparse layer with the slices of dense autograd."""
    assert oracle.dx is not None and plain.dx is not None and plain.dw is not None and oracle.dw is not None
    if ours.dx is not None:
        assert_close_to_oracle(ours.dx, plain.dx, oracle.dx, "dx")
    if index == []:
        assert ours.dw is None, "a layer with nothing selected got a weight gradient"
    else:
        assert ours.dw is not None, "the compact weight got no gradient"
        dw = embedded(ours.dw, plain.dw, layer, index, axis)
        assert_close_to_oracle(dw, plain.dw, oracle.dw, "dw")
    places = bias_index(layer, index, bias)
    if places == []:
        assert ours.db is None, "a bias that is not trained got a gradient"
        return
    assert ours.db is not None and plain.db is not None and oracle.db is not None, (
        "the compact bias got no gradient"
    )
    assert_close_to_oracle(embedded(ours.db, plain.db, layer, places, "out"), plain.db, oracle.db, "db")


def check_case(
    case: Case, axis: str, index: list[int] | None, bias: str = "all", needs_x: bool = True
) -> Result:
    """Values, gradients and saved bytes of one case under one selection; returns what the layer did."""
    x, layer = case.input(), case.ours()
    layer.set_channels(index, axis=axis, bias=bias)
    dy = gradient_of(layer(x))
    plain, oracle = run_stock(case.stock(), x, dy), run_stock(case.oracle(), x.double(), dy)
    ours = run_ours(layer, x, dy, needs_x)
    if case.same_bits:
        assert_same_bits(ours.y, plain.y, "y")
    assert_close_to_oracle(ours.y, plain.y, oracle.y, "y")
    assert ours.y.stride() == plain.y.stride(), (
        f"output strides {ours.y.stride()}, PyTorch's {plain.y.stride()}"
    )
    assert (ours.dx is not None) == needs_x
    assert_gradients(ours, plain, oracle, layer, index, axis, bias)
    assert_saved_bytes(ours, layer, x, index, axis)
    return ours


def expected_saved_bytes(layer: Any, x: Tensor, index: list[int] | None, axis: str) -> int:
    """Bytes of activations that DESIGN.md section 5 allows a layer to keep, index vectors apart."""
    if index == []:
        return 0
    own = x.untyped_storage().nbytes()
    if index is None:
        return own
    groups = getattr(layer, "groups", 1)
    if axis == "out" or is_depthwise(layer):
        rows = layer.weight.shape[0] // groups
        kept, of = len({i // rows for i in index}), groups
    else:
        kept, of = len(index), x.shape[-1] if isinstance(layer, nn.Linear) else layer.in_channels
    return own if kept == of else x.element_size() * x.numel() * kept // of


def assert_saved_bytes(ours: Result, layer: Any, x: Tensor, index: list[int] | None, axis: str) -> None:
    """Activation bytes equal section 5; index vectors take 8 bytes per selected channel, or nothing where x is sliced.

    A grouped layer keeps the vectors of its plan (`ops/conv2d_dw.py`), which name a channel of dy or x once per result.
    """
    expected = expected_saved_bytes(layer, x, index, axis)
    assert ours.saved == expected, (
        f"{ours.saved} bytes of activations saved, DESIGN section 5 says {expected}"
    )
    k = 0 if index is None else len(index)
    groups = getattr(layer, "groups", 1)
    if groups == 1 or is_depthwise(layer):
        out = axis == "out" or is_depthwise(layer)
        places = 8 * k if out and k < layer.num_channels("out") else 0
        assert ours.indices == places, f"{ours.indices} bytes of index vectors saved, {places} expected"
    else:
        limit = 8 * (k + layer.in_channels + layer.out_channels) if k else 0
        assert ours.indices <= limit, f"{ours.indices} bytes of index vectors saved, over {limit}"
