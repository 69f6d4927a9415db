"""max_pool2d in Triton: maxima, offsets and gradients bit by bit those of plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend
from sparse_bwd.ops.max_pool2d import max_pool2d, max_pool2d_dx
from sparse_bwd.ops.reference import max_pool2d_bwd_ref, max_pool2d_ref
from sparse_bwd.ops.triton import max_pool2d as kernels
from tests.cuda_host.checks import laid_out
from tests.tolerance import assert_same_bits
from tests.triton.drive import DTYPES, assert_near, config, integers, values

# Shape, kernel, stride, padding, dilation, ceil: tiles that end inside rows, images and channels, windows beside the
# image, windows that overlap, leave gaps, or hold more taps than are unrolled, one image in one window.
POOLS = [
    ((2, 3, 6, 8), [2, 2], [2, 2], [0, 0], [1, 1], False),
    ((2, 9, 7, 9), [3, 3], [2, 2], [1, 1], [1, 1], False),
    ((2, 3, 7, 9), [3, 2], [2, 1], [1, 0], [1, 2], False),
    ((1, 8, 5, 6), [2, 2], [2, 2], [1, 1], [1, 1], True),
    ((2, 2, 7, 7), [1, 2], [3, 3], [0, 1], [1, 3], False),
    ((1, 1, 10, 9), [6, 5], [3, 2], [0, 2], [1, 1], False),
    ((3, 4, 4, 4), [4, 4], [4, 4], [0, 0], [1, 1], False),
    ((1, 5, 1, 1), [1, 1], [1, 1], [0, 0], [1, 1], False),
]
INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(params=["contiguous", "channels_last"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The layout of a test, and tiles for it so small that every shape crosses their edges."""
    tile = {"POSITIONS": 128, "CHANNELS": 1}
    if request.param == "channels_last":
        tile = {"POSITIONS": 32, "CHANNELS": 4}
    for table in ("max_pool2d", "max_pool2d_dx"):
        config(monkeypatch, table, tile)
    return str(request.param)


def with_ties(*shape: int, dtype: torch.dtype) -> Tensor:
    """Few different values, so that most windows have equal maxima, and some NaN and infinities."""
    x = integers(*shape)
    for number in (NAN, INFINITY, -INFINITY):
        x = torch.where(torch.rand(shape) < 0.04, number, x)
    return x.to(dtype)


def check_forward(x: Tensor, window: list[Any]) -> tuple[Tensor, Tensor]:
    y, offset = max_pool2d(x, *window)
    with backend.forced("plain"):
        want, place = max_pool2d(x, *window)
    assert_same_bits(y, want, "y")
    assert_same_bits(offset, place, "offset")
    assert y.stride() == want.stride() and offset.stride() == place.stride()
    expected, where = max_pool2d_ref(x.cpu().float(), *window)
    assert_same_bits(y.cpu().float(), expected, "oracle")
    assert torch.equal(offset.cpu().long(), where)
    return y, offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_pool2d(pool: tuple[Any, ...], dtype: torch.dtype, layout: str, device: str) -> None:
    shape, *window = pool
    x = laid_out(with_ties(*shape, dtype=dtype), layout).to(device)
    y, offset = check_forward(x, window)
    for make in (integers, values):
        dy = laid_out(make(*y.shape, dtype=dtype), layout).to(device)
        dx = max_pool2d_dx(dy, offset, list(shape), *window)
        with backend.forced("plain"):  # on the CPU, which adds in the order of the windows
            want = max_pool2d_dx(dy.cpu(), offset.cpu(), list(shape), *window)
        assert dx.stride() == want.stride()
        if make is integers or dtype is torch.float32:  # others may be rounded between two windows
            assert_same_bits(dx.cpu(), want, "dx")
        assert_near(dx, max_pool2d_bwd_ref(x.double(), dy.double(), *window), make)
        other = laid_out(dy, "channels_last" if layout == "contiguous" else "contiguous")
        assert_same_bits(max_pool2d_dx(other, offset, list(shape), *window), dx, "dy in the other layout")


def test_nothing_but_infinities_and_nan(layout: str, device: str) -> None:
    for fill in (-INFINITY, NAN):
        x = laid_out(torch.full((1, 5, 6, 6), fill), layout).to(device)
        check_forward(x, [[3, 3], [2, 2], [1, 1], [1, 1], False])


def test_a_gradient_reaches_its_own_place_alone(layout: str, device: str) -> None:
    """What is NaN in dy becomes no zero times NaN elsewhere."""
    x = laid_out(torch.arange(48.0).view(1, 3, 4, 4), layout).to(device)
    window = ([3, 3], [1, 1], [0, 0], [1, 1], False)
    y, offset = max_pool2d(x, *window)
    dx = max_pool2d_dx(torch.full_like(y, NAN), offset, [1, 3, 4, 4], *window)
    want = torch.zeros_like(dx)
    want[:, :, 2:, 2:] = NAN
    assert_same_bits(dx, want)


def test_others_serve_what_it_cannot(device: str) -> None:
    x, window = values(2, 3, 6, 6, device=device), ([2, 2], [2, 2], [0, 0], [1, 1], False)
    with pytest.raises(NotImplementedError, match="triton"):
        max_pool2d(x, [2, 2], [2, 2], [2, 2], [1, 1], False)  # PyTorch refuses such a padding
    for bad in (x.double(), x[..., ::2], x[:0]):
        with pytest.raises(NotImplementedError, match="triton"):
            max_pool2d(bad, *window)
    huge = torch.empty(1, 1, 2**16, 2**15, device="meta")
    assert kernels.max_pool2d(huge, *window) is NotImplemented
    y, offset = max_pool2d(x, *window)
    for dy, where in ((y.double(), offset), (y, offset.new_empty(2, 3, 3, 6)[..., ::2])):
        with pytest.raises(NotImplementedError, match="triton"):
            max_pool2d_dx(dy, where, [2, 3, 6, 6], *window)
