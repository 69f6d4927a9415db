"""Tensors of more than 2**31 elements: places near their end are computed in 64 bits.

The memory is mapped but hardly touched, and of every launch of many blocks only the first and the last run: together
they hold both ends of the tensor.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from .emulated import COMPILER, Emulated, emulated

LINUX = sys.platform == "linux"
MAP_NORESERVE = 0x4000
# Neither the last element nor the beginning of the last image is within reach of 32 bits.
MORE = {
    "contiguous": (5, 2, 1 << 14, (1 << 14) + (1 << 9)),
    "channels_last": (5, 8, 1 << 13, (1 << 13) + (1 << 8)),
}

pytestmark = pytest.mark.skipif(
    COMPILER is None or not LINUX, reason="needs g++ and memory that is mapped lazily"
)
each_layout = pytest.mark.parametrize("layout", MORE)


@pytest.fixture
def ops() -> Iterator[Emulated]:
    library = emulated()
    with library.switched("ends_only"):
        yield library


def zeros(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Zeros [N, C, H, W] that take no memory before they are written."""
    n, c, h, w = shape
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, n * c * h * w * dtype.itemsize, flags=flags)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.view(n, h, w, c).permute(0, 3, 1, 2) if layout == "channels_last" else flat.view(shape)


def first_and_last(x: Tensor) -> list[float]:
    return [float(x[0, 0, 0, 0]), float(x[-1, -1, -1, -1])]


@each_layout
def test_affine_act_reaches_both_ends(ops: Emulated, layout: str) -> None:
    shape = MORE[layout]
    x, y = zeros(shape, torch.bfloat16, layout), zeros(shape, torch.bfloat16, layout)
    mask = zeros((1, 1, 1, x.numel() // 8), torch.uint8, "contiguous").view(-1)
    x[0, 0, 0, 0] = x[-1, -1, -1, -1] = 1.0
    scale, shift = torch.arange(1.0, shape[1] + 1), torch.zeros(shape[1])
    inner = 1 if layout == "channels_last" else shape[2] * shape[3]
    ops.affine_act(y, mask, x, scale, shift, inner, 1, 0.0, 0.0)
    assert first_and_last(y) == [1.0, float(shape[1])]
    assert int(mask[0]) == 0b11111110 and int(mask[-1]) == 0b01111111
    for dshift in (None, torch.zeros(shape[1])):
        dx = zeros(shape, torch.bfloat16, layout)
        ops.affine_act_dx(dx, dshift, x, scale, mask, shape[1], inner, 1, 0.0)
        assert first_and_last(dx) == [1.0, float(shape[1])]
        if dshift is not None:
            assert dshift.tolist() == [1.0, *[0.0] * (shape[1] - 2), 1.0]


@each_layout
def test_max_pool2d_reaches_both_ends(ops: Emulated, layout: str) -> None:
    x, y, dx = (zeros(MORE[layout], torch.float16, layout) for _ in range(3))
    offset = zeros(MORE[layout], torch.uint8, layout)
    x[0, 0, 0, 0] = x[-1, -1, -1, -1] = 5.0
    window, last = ([3, 3], [1, 1], [1, 1], [1, 1]), layout == "channels_last"
    ops.max_pool2d(y, offset, x, *window, last)
    assert first_and_last(y) == [5.0, 5.0]
    assert first_and_last(offset) == [4.0, 4.0]
    ops.max_pool2d_dx(dx, x, offset, *window, last)
    assert first_and_last(dx) == [5.0, 5.0]


@pytest.mark.long
@each_layout
def test_depthwise_dw_reaches_both_ends(ops: Emulated, layout: str) -> None:
    n, c, h, w = MORE[layout]
    x, dy = zeros((n, c, h, w), torch.float16, layout), zeros((n, c + 1, h, w), torch.float16, layout)
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = 2.0, 3.0
    dy[0, 1, 0, 0], dy[-1, -1, -1, -1] = 5.0, 7.0
    dw = torch.empty(c, 1, 3, 3, dtype=torch.float16)
    rows = torch.arange(1, c + 1)
    ops.conv2d_dw(dw, x, dy, rows, [1, 1], [1, 1], [1, 1], c, layout == "channels_last")
    expected = torch.zeros(c, 1, 3, 3, dtype=torch.float16)
    expected[0, 0, 1, 1], expected[-1, 0, 1, 1] = 10.0, 21.0
    assert torch.equal(dw, expected)


@each_layout
def test_response_reaches_both_ends(ops: Emulated, layout: str) -> None:
    n, c, h, w = MORE[layout]
    new, previous = (zeros((n, c, h, w), torch.float16, layout) for _ in range(2))
    new[0, 0, 0, 0], new[-1, -1, -1, -1] = 2.0, 3.0
    previous[0, 0, 0, 0], previous[-1, -1, -1, -1] = 5.0, 7.0
    sums = torch.empty(3, n, c, dtype=torch.float64)
    ops.response(sums, previous, new, layout == "channels_last")
    assert sums[:, 0, 0].tolist() == [10.0, 4.0, 25.0]
    assert sums[:, -1, -1].tolist() == [21.0, 9.0, 49.0]
    assert first_and_last(previous) == [2.0, 3.0]
