"""max_pool2d in Triton: the maximum of each window and its offset in one byte, and the gradient gathered from both.

    y[n, i, j, c] = max over (a, b) of x[n, i s - p + a d, j s - p + b d, c]        offset = a kw + b
    dx[n, h, w, c] = sum over the windows (i, j) that cover (h, w) of dy[n, i, j, c] where their offset is (h, w)

A tile is some positions of some channels, written here as channels_last. NCHW is the same with one channel and N C
images, so that a position is all that a lane has; its index is divided once, not for each tap. The window is known when
the kernel is compiled, and so is a divisor of the channels (UNIT), for accesses of 16 bytes. Backward adds in float32
and in the order of the windows, each element of dx in one lane: no atomics.

Moves   forward e X + (e + 1) Y, backward (e + 1) Y + e X bytes        computes   kh kw comparisons of each output
"""

from collections.abc import Sequence
from math import gcd, prod
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.layout import is_channels_last
from sparse_bwd.ops.max_pool2d import gradients, results
from sparse_bwd.ops.triton.launch import TYPES, ceil_div, config, launch
from sparse_bwd.ops.tuning import Config

LARGEST = 2**30  # positions of an image, so that places inside it are 32-bit
UNROLLED = 9  # taps or windows at most that are written out one after another, for their loads to overlap


@triton.jit
def place_of(positions, width, POSITIONS: tl.constexpr):
    """Image (64 bits), row and column of the positions of a program, for images of `positions` in rows of `width`."""
    first = tl.program_id(0).to(tl.int64) * POSITIONS
    here = (first % positions).to(tl.int32) + tl.arange(0, POSITIONS)
    within = here % positions
    return first // positions + here // positions, within // width, within % width


@triton.jit
def largest(
    x, y, offset, count, groups, height, width, y_height, y_width,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, UNROLL: tl.constexpr, UNIT: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Maxima and offsets of one tile of `count` outputs: the first of equal values, but a NaN beats all before it."""
    channels = groups * UNIT
    first = tl.program_id(0).to(tl.int64) * POSITIONS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = place_of(y_height * y_width, y_width, POSITIONS)
    known = first + tl.arange(0, POSITIONS) < count
    top = row * SH - PH
    left = column * SW - PW
    source = x + (image * height * width * channels)[:, None] + channel[None, :]
    best = tl.full((POSITIONS, CHANNELS), float("-inf"), dtype=tl.float32)
    at = tl.full((POSITIONS, CHANNELS), -1, dtype=tl.int32)
    for tap in tl.range(0, KH * KW, loop_unroll_factor=UNROLL):
        h = top + tap // KW * DH
        w = left + tap % KW * DW
        inside = known & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        inside = inside[:, None] & (channel < channels)[None, :]
        pixel = (h * width + w).to(tl.int64) * channels
        value = tl.load(source + pixel[:, None], mask=inside, other=float("-inf")).to(tl.float32)
        taken = inside & ((value > best) | (value != value) | (at < 0))
        best = tl.where(taken, value, best)
        at = tl.where(taken, tap, at)
    base = first * channels
    place = tl.arange(0, POSITIONS)[:, None] * channels + channel[None, :]
    inside = known[:, None] & (channel < channels)[None, :]
    tl.store(y + base + place, best.to(y.dtype.element_ty), mask=inside)
    tl.store(offset + base + place, at.to(tl.uint8), mask=inside)


@triton.jit
def gathered(
    dy, offset, dx, count, groups, height, width, y_height, y_width,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, UNROLL: tl.constexpr, UNIT: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of `count` positions of dx, each from the at most TALL x WIDE windows that cover it."""
    TALL: tl.constexpr = (KH - 1) * DH // SH + 1
    WIDE: tl.constexpr = (KW - 1) * DW // SW + 1
    channels = groups * UNIT
    first = tl.program_id(0).to(tl.int64) * POSITIONS
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = place_of(height * width, width, POSITIONS)
    known = first + tl.arange(0, POSITIONS) < count
    row += PH
    column += PW
    # The first window whose last tap is not above or left of the position.
    top = tl.maximum(row - (KH - 1) * DH + SH - 1, 0) // SH
    left = tl.maximum(column - (KW - 1) * DW + SW - 1, 0) // SW
    source = (image * y_height * y_width * channels)[:, None] + channel[None, :]
    total = tl.zeros((POSITIONS, CHANNELS), dtype=tl.float32)
    for window in tl.range(0, TALL * WIDE, loop_unroll_factor=UNROLL):
        i = top + window // WIDE
        j = left + window % WIDE
        h = row - i * SH
        w = column - j * SW
        covers = known & (i < y_height) & (j < y_width) & (h >= 0) & (w >= 0)
        covers = covers & (h % DH == 0) & (w % DW == 0)
        tap = tl.where(covers, h // DH * KW + w // DW, -1)
        inside = covers[:, None] & (channel < channels)[None, :]
        place = source + ((i * y_width + j).to(tl.int64) * channels)[:, None]
        hit = tl.load(offset + place, mask=inside, other=0).to(tl.int32) == tap[:, None]
        if (
            CHANNELS == 1
        ):  # lanes that need no value read none; in a row of channels that would break up the access
            value = tl.load(dy + place, mask=hit, other=0.0)
        else:
            value = tl.load(dy + place, mask=inside, other=0.0)
        total += tl.where(hit, value.to(tl.float32), 0.0)
    place = tl.arange(0, POSITIONS)[:, None] * channels + channel[None, :]
    inside = known[:, None] & (channel < channels)[None, :]
    tl.store(dx + first * channels + place, total.to(dx.dtype.element_ty), mask=inside)


class Call(NamedTuple):
    """What both launches need to know: the images, how many channels lie side by side, the window, the tiles."""

    x: Tensor
    y: Tensor
    channels: int
    window: Sequence[Sequence[int]]
    chosen: Config

    def start(self, function: Any, count: int, loops: int, **tensors: Tensor) -> None:
        """Start a kernel over `count` positions, which looks `loops` times from each."""
        tile, unit = self.chosen.tile, gcd(self.channels, 16)
        names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
        constants = dict(zip(names, (size for pair in self.window for size in pair), strict=True))
        launch(
            function, (ceil_div(count, tile["POSITIONS"]), ceil_div(self.channels, tile["CHANNELS"])), self.chosen,
            {**constants, "UNROLL": loops if loops <= UNROLLED else 2, "UNIT": unit},
            **tensors, count=count, groups=self.channels // unit, height=self.x.shape[2], width=self.x.shape[3],
            y_height=self.y.shape[2], y_width=self.y.shape[3],
        )  # fmt: skip


def _prepared(table: str, x: Tensor, y: Tensor, last: bool, window: Sequence[Sequence[int]]) -> Call | None:
    """None where others serve the call."""
    small = max(image.shape[2] * image.shape[3] for image in (x, y)) <= LARGEST
    if x.dtype not in TYPES or 0 in (x.numel(), y.numel()) or not small or prod(window[0]) > 256:
        return None
    channels = x.shape[1] if last else 1
    chosen = config(table, x, channels=channels, bytes=x.dtype.itemsize)
    return None if chosen is None else Call(x, y, channels, window, chosen)


def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[Tensor, Tensor]:
    window = (kernel, stride, padding, dilation)
    made = results(x, *window, ceil)
    call = None if made is None else _prepared("max_pool2d", x, made[0], is_channels_last(x), window)
    if made is None or call is None:
        return NotImplemented
    y, offset = made
    call.start(largest, y.numel() // call.channels, prod(kernel), x=x, y=y, offset=offset)
    return made


def max_pool2d_dx(
    dy: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> Tensor:
    window = (kernel, stride, padding, dilation)
    made = gradients(dy, offset, shape)
    call = None if made is None else _prepared("max_pool2d_dx", *made, is_channels_last(offset), window)
    if made is None or call is None:
        return NotImplemented
    dx, dy = made
    covering = prod((kernel[i] - 1) * dilation[i] // stride[i] + 1 for i in (0, 1))
    call.start(gathered, dx.numel() // call.channels, covering, dy=dy, offset=offset, dx=dx)
    return dx
