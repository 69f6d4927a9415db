"""The least that a call of an operator must move, and what it must compute.

e = bytes per element, N images, P positions of the output, k of C channels selected.

    linear_dw            bytes  e (M C_in + M k + k C_in + k) + 8 k          operations  2 M k C_in + M k
    with statistics      and    2 e k C_in + 12 k                            and         6 k C_in
    conv2d_dw            bytes  e (x that a tap reads + N k P + dw) + 8 k    operations  2 N P per weight of dw
    affine_act           bytes  2 e X + X / 8 (flags) + 8 C                  operations  3 X   (1 X without a norm)
    affine_act_dx        bytes  2 e X + X / 8 (flags) + 4 C                  operations  2 X   (1 X without a norm)
      with dshift        and    4 C                                          and         X
    max_pool2d           bytes  e (x that a window reads + Y) + Y            operations  Y kh kw
    max_pool2d_dx        bytes  e (X + Y) + Y                                operations  Y
    response             bytes  e X + 2 (stored response) + 24 N k + 8 k      operations  6 X   (of k channels)
    affine_act_response  both of the above, where x is read once and in place
    response_sketch      bytes  e X + 16 C r                                 operations  4 X
    norm_affine          bytes  24 C                                         operations  5 C
    write_back           bytes  2 e (trained weights) + 8 k per layer        operations  0

A product with its addition counts as two operations. Every tensor is read or written once.
"""

from __future__ import annotations

from typing import NamedTuple

from sparse_bwd.measure.networks import Conv, Pool
from sparse_bwd.ops.bits import packed_size


class Work(NamedTuple):
    """The least that a call must move, in bytes, and its operations."""

    bytes: int
    operations: int


def linear_work(m: int, c_in: int, k: int, itemsize: int, gathered: bool, statistics: bool = False) -> Work:
    """`linear_dw` with its bias, from x [m, c_in] and k channels of dy, `gathered` by an index or all of them."""
    moved = itemsize * (m * c_in + m * k + k * c_in + k) + 8 * k * gathered
    extra = (2 * itemsize * k * c_in + 12 * k, 6 * k * c_in) if statistics else (0, 0)
    return Work(moved + extra[0], 2 * m * k * c_in + m * k + extra[1])


def touched_lines(size: int, kernel: int, stride: int, padding: int, size_out: int) -> int:
    """Lines of an image that at least one tap reads."""
    read = {i * stride - padding + a for i in range(size_out) for a in range(kernel)}
    return sum(0 <= line < size for line in read)


def conv_work(
    layer: Conv, batch: int, kept: int, k: int, weights: int, itemsize: int, gathered: bool
) -> Work:
    """`conv2d_dw` of so many weights from `kept` channels of x and k of dy, `gathered` by an index or all of them."""
    lines = touched_lines(layer.size, layer.kernel, layer.stride, layer.padding, layer.size_out)
    positions = batch * layer.size_out**2
    moved = itemsize * (batch * kept * lines**2 + k * positions + weights) + 8 * k * gathered
    return Work(moved, 2 * positions * weights)


def affine_work(elements: int, channels: int, itemsize: int, flags: bool) -> Work:
    """`affine_act` of so many channels (0: the activation alone), with the flags that backward needs or without."""
    moved = 2 * itemsize * elements + packed_size(elements) * flags + 8 * channels
    return Work(moved, (3 if channels else 1) * elements)


def affine_dx_work(elements: int, channels: int, itemsize: int, flags: bool, shift: bool) -> Work:
    """`affine_act_dx`, with the gradient of the shift where it is trained."""
    moved = 2 * itemsize * elements + packed_size(elements) * flags + 4 * channels * (1 + shift)
    return Work(moved, ((2 if channels else 1) + shift) * elements)


def pool_work(layer: Pool, batch: int, itemsize: int) -> tuple[Work, Work]:
    """`max_pool2d` and `max_pool2d_dx`."""
    read = batch * layer.channels * touched_lines(layer.size, 3, 2, 1, layer.size_out) ** 2
    x, y = (batch * layer.channels * size**2 for size in (layer.size, layer.size_out))
    return Work(itemsize * (read + y) + y, 9 * y), Work(itemsize * (x + y) + y, y)


def response_work(n: int, k: int, positions: int, itemsize: int, stored: int, gathered: bool = False) -> Work:
    """`response` of k channels; the stored response has `stored` bytes per element."""
    elements = n * k * positions
    return Work((itemsize + 2 * stored) * elements + 24 * n * k + 8 * k * gathered, 6 * elements)


def sketch_work(n: int, channels: int, positions: int, itemsize: int, numbers: int) -> Work:
    """`response_sketch` of so many numbers per channel."""
    elements = n * channels * positions
    return Work(itemsize * elements + 16 * channels * numbers, 4 * elements)


def norm_affine_work(channels: int) -> Work:
    """`norm_affine`: four vectors in float32 become two."""
    return Work(24 * channels, 5 * channels)


def write_back_work(weights: int, selected: int, itemsize: int) -> Work:
    """`write_back` of so many trained weights of so many selected channels."""
    return Work(2 * itemsize * weights + 8 * selected, 0)
