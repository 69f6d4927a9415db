"""max_pool2d: max pooling that keeps one byte per output, the offset of the maximum inside its window.

    y[n, c, i, j] = max over (a, b) of x[n, c, i s - p + a d, j s - p + b d]        offset = a kw + b  (0 to 255)

Kept for backward: Y bytes, instead of x and an int64 index per output. Extra work of plain PyTorch: the offsets are
turned into its indices again in backward, a few images at a time; native code and Triton read them as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bwd.ops.backend import known, native, register
from sparse_bwd.ops.layout import is_channels_last

BLOCK = 1 << 18


def _blocks(y: Tensor) -> Iterator[slice]:
    """Runs of images whose int64 indices together stay near BLOCK elements."""
    images = max(BLOCK // max(y[0].numel(), 1), 1) if y.shape[0] else 1
    for start in range(0, y.shape[0], images):
        yield slice(start, min(start + images, y.shape[0]))


def _origin(size: int, stride: int, padding: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device, dtype=torch.int64) * stride - padding


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def max_pool2d_plain(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[Tensor, Tensor]:
    shape = _output_shape(x, kernel, stride, padding, dilation, ceil)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    offset = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=_layout(x))
    top = _origin(shape[2], stride[0], padding[0], x)[:, None]
    left = _origin(shape[3], stride[1], padding[1], x)
    for block in _blocks(y):
        best, index = F.max_pool2d_with_indices(
            x[block], _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), ceil
        )
        y[block].copy_(best)
        row, column = index // x.shape[3], index % x.shape[3]
        row, column = (row - top) // dilation[0], (column - left) // dilation[1]
        offset[block].copy_(row.mul_(kernel[1]).add_(column))
    return y, offset


def max_pool2d_dx_plain(
    dy: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> Tensor:
    dx = torch.empty(tuple(shape), dtype=dy.dtype, device=dy.device, memory_format=_layout(offset))
    top = _origin(dy.shape[2], stride[0], padding[0], dy)[:, None]
    left = _origin(dy.shape[3], stride[1], padding[1], dy)
    for block in _blocks(dy):
        where = offset[block].to(torch.int64)
        index = (where // kernel[1] * dilation[0] + top) * shape[3]
        index += where % kernel[1] * dilation[1] + left
        # `self` is read for its shape and memory format alone, so the result's own memory serves.
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            dy[block], dx[block], list(kernel), list(stride), list(padding), list(dilation), ceil, index,
            grad_input=dx[block],
        )  # fmt: skip
    return dx


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or is_channels_last(x)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def results(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[Tensor, Tensor] | None:
    """Room for y and the offsets; None for x with gaps, and for windows that PyTorch refuses in its own words."""
    shape = _output_shape(x, kernel, stride, padding, dilation, ceil)
    legal = min(shape[2:]) > 0 and all(
        2 * padding[i] <= kernel[i] and dilation[i] <= x.shape[2 + i] for i in (0, 1)
    )
    if not (legal and _dense(x)):
        return None
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    return y, torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=_layout(x))


def gradients(dy: Tensor, offset: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Room for dx, and dy in the layout of the offsets; None for offsets with gaps."""
    if not _dense(offset):
        return None
    dx = torch.empty(tuple(shape), dtype=dy.dtype, device=dy.device, memory_format=_layout(offset))
    return dx, dy.contiguous(memory_format=_layout(offset))


def max_pool2d_native(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[Tensor, Tensor]:
    made = results(x, kernel, stride, padding, dilation, ceil) if known(x) else None
    if made is None:
        return NotImplemented
    native("max_pool2d")(*made, x, kernel, stride, padding, dilation, is_channels_last(x))
    return made


def max_pool2d_dx_native(
    dy: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> Tensor:
    made = gradients(dy, offset, shape) if known(dy) else None
    if made is None:
        return NotImplemented
    dx, dy = made
    native("max_pool2d_dx")(dx, dy, offset, kernel, stride, padding, dilation, is_channels_last(offset))
    return dx


def _output_shape(x, kernel, stride, padding, dilation, ceil):  # type: ignore[no-untyped-def]
    sizes = []
    for i in range(2):
        span = x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        size = (span + (stride[i] - 1 if ceil else 0)) // stride[i] + 1
        # A last window that would start in the right-hand padding is dropped, as in PyTorch.
        if ceil and (size - 1) * stride[i] >= x.shape[2 + i] + padding[i]:
            size -= 1
        sizes.append(size)
    return (x.shape[0], x.shape[1], *sizes)


def _fake(x, kernel, stride, padding, dilation, ceil):  # type: ignore[no-untyped-def]
    shape = _output_shape(x, kernel, stride, padding, dilation, ceil)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    return y, torch.empty_like(y, dtype=torch.uint8)


def _fake_dx(dy, offset, shape, kernel, stride, padding, dilation, ceil):  # type: ignore[no-untyped-def]
    return torch.empty(tuple(shape), dtype=dy.dtype, device=dy.device, memory_format=_layout(offset))


_WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil"
max_pool2d = register(
    f"max_pool2d(Tensor x, {_WINDOW}) -> (Tensor, Tensor)",
    max_pool2d_plain,
    _fake,
    max_pool2d_native,
    triton="max_pool2d",
)
max_pool2d_dx = register(
    f"max_pool2d_dx(Tensor dy, Tensor offset, SymInt[] shape, {_WINDOW}) -> Tensor",
    max_pool2d_dx_plain,
    _fake_dx,
    max_pool2d_dx_native,
    triton="max_pool2d",
)
