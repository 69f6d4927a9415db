"""conv2d_dw in Triton against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops.conv2d_dw import conv2d_dw, kept_input, make_plan, memory_format_of
from sparse_bwd.ops.padding import Geometry
from sparse_bwd.ops.reference import conv2d_dw_ref
from sparse_bwd.ops.triton import conv2d_dw as products
from sparse_bwd.ops.triton import depthwise, linear_dw
from sparse_bwd.ops.triton.launch import recorded
from tests.triton.drive import DTYPES, assert_near, config, integers, values

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TILE = {"ROWS": 16, "COLUMNS": 32, "POSITIONS": 16}
PAD = (1, 1, 1, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and splits so small that small images need several of them."""
    config(monkeypatch, "conv2d_dw", TILE)
    config(monkeypatch, "depthwise_dw", {"CHANNELS": 4, "LANES": 16, "UNROLL": 2})
    monkeypatch.setattr(depthwise, "DEPTH", 3)
    monkeypatch.setattr(depthwise, "PROGRAMS", 6)
    monkeypatch.setattr(linear_dw, "STEPS", 1)
    monkeypatch.setattr(linear_dw, "PROGRAMS", 6)


class Layer(NamedTuple):
    """A convolution and its input: C_in, C_out, the kernel, N and the image; what else it has has a default."""

    c_in: int
    c_out: int
    kernel: tuple[int, int]
    batch: int
    image: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: str = "zeros"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding, self.mode, self.dilation, self.groups)

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.c_out, self.c_in // self.groups, *self.kernel)

    def output(self) -> list[int]:
        left, right, top, bottom = self.padding
        padded = (self.image[0] + top + bottom, self.image[1] + left + right)
        return [
            (padded[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for i in (0, 1)
        ]


LAYERS = {
    "1x1": Layer(18, 20, (1, 1), 2, (6, 5)),
    "1x1-of-pixels": Layer(5, 9, (1, 1), 40, (1, 1)),
    "1x1-stride": Layer(18, 20, (1, 1), 2, (7, 5), stride=(2, 2)),
    "1x1-padding": Layer(3, 4, (1, 1), 1, (4, 5), padding=PAD),
    "3x3": Layer(4, 18, (3, 3), 2, (5, 4), padding=PAD),
    "3x3-inside": Layer(4, 4, (3, 3), 2, (6, 7)),
    "3x3-stride-dilation": Layer(4, 6, (3, 3), 1, (12, 11), (2, 3), (2, 2, 1, 1), dilation=(2, 1)),
    "5x3": Layer(2, 5, (5, 3), 2, (4, 6), padding=(1, 1, 2, 2)),
    "2x2-same": Layer(4, 6, (2, 2), 1, (5, 6), padding=(0, 1, 0, 1)),
    "3x3-reflect": Layer(2, 4, (3, 3), 1, (4, 5), padding=(2, 2, 1, 1), mode="reflect"),
    "7x7": Layer(1, 17, (7, 7), 1, (9, 8), (2, 2), (3, 3, 3, 3)),
    "groups": Layer(6, 9, (3, 3), 2, (6, 5), padding=PAD, groups=3),
    "groups-even": Layer(8, 40, (1, 1), 2, (5, 6), stride=(2, 1), groups=2),
    "groups-of-one": Layer(2, 40, (3, 3), 1, (5, 6), padding=PAD, groups=2),
    "depthwise": Layer(6, 6, (3, 3), 2, (7, 9), padding=PAD, groups=6),
    "depthwise-inside": Layer(6, 6, (3, 3), 3, (9, 6), groups=6),
    "depthwise-stride": Layer(6, 6, (3, 3), 2, (13, 8), (2, 2), PAD, groups=6),
    "depthwise-dilation": Layer(3, 3, (3, 3), 1, (9, 11), (1, 2), (2, 2, 1, 1), dilation=(2, 2), groups=3),
    "depthwise-stride-dilation": Layer(
        3, 3, (3, 2), 1, (13, 7), (2, 1), (1, 1, 3, 3), dilation=(3, 1), groups=3
    ),
    "depthwise-stride-over-kernel": Layer(4, 4, (2, 2), 1, (12, 11), (5, 3), groups=4),
    "depthwise-multiplier": Layer(4, 8, (3, 3), 2, (7, 6), padding=PAD, groups=4),
    "depthwise-2x2-same": Layer(4, 4, (2, 2), 2, (6, 5), padding=(0, 1, 0, 1), groups=4),
    "depthwise-reflect": Layer(4, 4, (3, 3), 1, (6, 7), padding=PAD, mode="reflect", groups=4),
    "depthwise-9x2": Layer(3, 3, (9, 2), 1, (8, 5), padding=(1, 1, 4, 4), groups=3),
    "depthwise-1x1": Layer(6, 6, (1, 1), 2, (5, 4), groups=6),
}


def called(layer: Layer, index: Tensor | None, axis: str, x: Tensor, dy: Tensor, size: list[int]) -> Tensor:
    """The operator as a layer calls it; dw is in the layout of what was kept of x."""
    plan = make_plan(None if index is None else index.cpu(), axis, layer.c_in, layer.c_out, layer.groups)
    keep, spread, rows, pick = (None if each is None else each.to(x.device) for each in plan[:4])
    regroup = axis == "in" and layer.groups > 1
    kept = kept_input(x, keep)
    dw = conv2d_dw(
        kept, dy, spread, rows, pick, size, layer.stride, layer.padding, layer.mode, layer.dilation,
        plan.groups, regroup,
    )  # fmt: skip
    assert dw.is_contiguous(memory_format=memory_format_of(kept))
    return dw


def check(
    layer: Layer, chosen: list[int] | None, axis: str, layout: str, make: Callable[..., Tensor], **made: Any
) -> None:
    """dw of operands in a layout."""
    x = make(layer.batch, layer.c_in, *layer.image, **made).to(memory_format=FORMATS[layout])
    dy = make(layer.batch, layer.c_out, *layer.output(), **made).to(memory_format=FORMATS[layout])
    index = None if chosen is None else torch.tensor(chosen, device=x.device)
    weight = torch.zeros(layer.weight, dtype=torch.float64, device=x.device)
    want = conv2d_dw_ref(x.double(), dy.double(), weight, index, axis, layer.geometry)
    dw = called(layer, index, axis, x, dy, list(want.shape))
    assert_near(dw, want, make)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_conv2d_dw(name: str, layout: str, device: str) -> None:
    layer = LAYERS[name]
    some_out, some_in = (sorted({0, c // 3, c // 2, c - 1}) for c in (layer.c_out, layer.c_in))
    check(layer, some_out, "out", layout, integers, device=device)
    check(layer, some_in, "in", layout, integers, device=device)
    if layout == "nchw":
        check(layer, [layer.c_out // 2], "out", layout, integers, device=device)
        check(layer, None, "out", layout, integers, device=device)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["1x1", "1x1-stride", "3x3", "groups", "depthwise", "depthwise-multiplier"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding(dtype: torch.dtype, name: str, layout: str, device: str) -> None:
    check(LAYERS[name], [0, 3, 5], "out", layout, values, dtype=dtype, device=device)


@pytest.mark.parametrize("name", ["1x1", "3x3", "depthwise"])
def test_operands_in_other_layouts(name: str, device: str) -> None:
    """Gaps between images, channels or pixels, and dy in another layout than x."""
    layer = LAYERS[name]
    wide = integers(layer.batch, layer.c_in + 1, layer.image[0], 2 * layer.image[1], device=device)
    dy = integers(layer.batch, layer.c_out, *layer.output(), device=device)
    weight = torch.zeros(layer.weight, dtype=torch.float64, device=device)
    for x in (wide[:, 1:, :, ::2], wide[:, 1:, :, : layer.image[1]]):
        want = conv2d_dw_ref(x.double(), dy.double(), weight, None, "out", layer.geometry)
        for gradient in (dy, dy.to(memory_format=torch.channels_last)):
            assert_near(called(layer, None, "out", x, gradient, list(layer.weight)), want, integers)


@pytest.mark.parametrize("name", ["1x1", "3x3", "depthwise"])
def test_the_same_bits_every_time(name: str, device: str) -> None:
    layer = LAYERS[name]._replace(batch=4)
    x = values(layer.batch, layer.c_in, *layer.image, device=device)
    dy = values(layer.batch, layer.c_out, *layer.output(), device=device)
    first = called(layer, None, "out", x, dy, list(layer.weight))
    assert torch.equal(first, called(layer, None, "out", x, dy, list(layer.weight)))
    assert torch.equal(first, called(layer, None, "out", x.clone(), dy.clone(), list(layer.weight)))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("1x1", ["partial_products", "add_splits"]),
        ("1x1-stride", ["partial_convolutions", "add_splits"]),
        ("3x3", ["partial_convolutions", "add_splits"]),
        ("groups-of-one", ["partial_convolutions", "add_splits"]),
        ("depthwise", ["partial_filters", "add_splits"]),
        ("depthwise-1x1", ["partial_filters"]),
    ],
)
def test_which_kernels_serve(name: str, kernels: list[str], device: str) -> None:
    """Tensors without values are enough, and several splits were made where the other tests need them."""
    layer = LAYERS[name]
    x = torch.empty(layer.batch, layer.c_in, *layer.image, device="meta")
    dy = torch.empty(layer.batch, layer.c_out, *layer.output(), device="meta")
    with recorded("sm_90") as launches:
        products.conv2d_dw(x, dy, None, None, None, layer.weight, *layer.geometry[:4], layer.groups, False)
    assert [each.kernel.__name__ for each in launches] == kernels


def test_the_table_may_leave_a_kind_of_layer_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "config", lambda *_, **__: None)
    monkeypatch.setattr(depthwise, "config", lambda *_, **__: None)
    for layer in (LAYERS["1x1"], LAYERS["3x3"], LAYERS["depthwise"]):
        x = torch.empty(layer.batch, layer.c_in, *layer.image, device="meta")
        dy = torch.empty(layer.batch, layer.c_out, *layer.output(), device="meta")
        arguments = (x, dy, None, None, None, layer.weight, *layer.geometry[:4], layer.groups, False)
        assert products.conv2d_dw(*arguments) is NotImplemented


def test_others_serve_what_it_cannot(device: str) -> None:
    layer = LAYERS["3x3"]
    x = values(2, layer.c_in, *layer.image, device=device)
    dy = values(2, layer.c_out, *layer.output(), device=device)
    for a, b in ((x.double(), dy.double()), (x[:0], dy[:0]), (x, dy.half())):
        with pytest.raises(NotImplementedError, match="triton"):
            called(layer, None, "out", a, b, list(layer.weight))
    huge = torch.empty(1, 1, 1, 1, device="meta").expand(1, 1, 2**16, 2**16)
    apart = huge.as_strided((1, 1, 2, 2), (1, 1, 2**31, 1))
    same = torch.empty(1, 1, 2, 2, device="meta")
    assert products.conv2d_dw(
        apart, same, None, None, None, (1, 1, 1, 1), (1, 1), (0,) * 4, "zeros", (1, 1), 1, False
    ) is NotImplemented  # fmt: skip
