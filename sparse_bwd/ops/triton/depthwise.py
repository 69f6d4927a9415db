"""Depthwise conv2d_dw in Triton: one filter per selected channel, and no other channel of dy is read.

    dw[j, a, b] = sum over images n and outputs (p, q) of
                  dy[n, rows[j], p, q] x[n, j // multiplier, p stride - pad + a dilation, q stride - pad + b dilation]

A lane has one channel and one column q of outputs and walks down the image, with a sum for every tap in registers. At
its step v it reads dy[p = v] and the rows v stride - pad + r of x, which tap a of output p = v - t needs for
a dilation = r + t stride, t <= reach. So dy of the last steps stays in registers, every row of x is read once and not
once for each tap above the other, and what is inside the image is a question to each lane once, and to each row.

Lanes side by side are outputs side by side in NCHW (one channel per program) and selected channels side by side in
channels_last, by the same kernel: everything is given by strides. Filters of more than 7 taps across or down are cut
into blocks of taps. Where few channels leave multiprocessors idle, the columns and the rows are cut into splits, whose
float32 results a second kernel adds in order.

Moves   e N P_x k / multiplier + e N P_y k + splits 4 k kh kw bytes twice        multiplies   N P_y k kh kw

with P_x and P_y the positions of one image of x and dy. In channels_last a read of one channel of dy moves the 32 bytes
around it, so that dy may cost up to that of all channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.padding import Geometry, pad
from sparse_bwd.ops.triton.launch import ceil_div, config, launch
from sparse_bwd.ops.triton.splits import most_splits, sum_of_splits

PROGRAMS = 1056  # to have at least, by splitting: eight for each multiprocessor of the largest GPUs
DEPTH = 8  # output rows of a split, at least
TAPS = 7  # of a program across and down, at most


@triton.jit
def repeated(value, count):
    """A tuple of one value, so many times."""
    result: tl.tuple = ()
    for _ in tl.static_range(count):
        result = result + (value,)
    return result


@triton.jit
def pushed(held, value, count):
    """The value before all of `count` but the last."""
    result: tl.tuple = (value,)
    for i in tl.static_range(count - 1):
        result = result + (held[i],)
    return result


@triton.jit
def lanes_inside(there, column, width, dilation, across, masked):
    """For every tap across, the lanes that it finds inside the image."""
    result: tl.tuple = ()
    for b in tl.static_range(across):
        if masked:
            place = column + b * dilation
            result = result + (there & ((place >= 0) & (place < width))[:, None],)
        else:
            result = result + (there,)
    return result


@triton.constexpr_function
def _is_read(r, stride, dilation, down):
    """Whether a tap reads row r of the rows of x that belong to one output row."""
    return any(a * dilation % stride == r for a in range(down))


@triton.jit
def new_rows(values, inside, first, height, x_row, x_tap, stride, dilation, down, across):
    """Every tap across of `stride` rows of x from the first on: what this step is the first to meet."""
    result: tl.tuple = ()
    for r in tl.static_range(stride):
        row = first + r
        within = (row >= 0) & (row < height)
        for b in tl.static_range(across):
            if _is_read(r, stride, dilation, down):
                read = tl.load(values + (row * x_row + b * x_tap), mask=inside[b] & within, other=0.0)
                result = result + (read.to(tl.float32),)
            else:
                result = result + (0.0,)
    return result


@triton.jit
def added(sums, held, read, stride, dilation, down, across):
    """The sums of all taps with the products of one step."""
    result: tl.tuple = ()
    for a in tl.static_range(down):
        for b in tl.static_range(across):
            value = held[a * dilation // stride] * read[a * dilation % stride * across + b]
            result = result + (sums[a * across + b] + value,)
    return result


@triton.jit
def partial_filters(
    x, dy, rows, products,
    k, multiplier, lanes, chunks, depth, steps, blocks_across,
    height, width, out_height, out_width, kernel_height, kernel_width,
    top, left, stride_width, dilation_width,
    x_image, x_channel, x_row, x_column, dy_image, dy_channel, dy_row, dy_column,
    STRIDE: tl.constexpr, DILATION: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, MASKED: tl.constexpr,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One block of DOWN x ACROSS taps of CHANNELS filters over one split; STRIDE and DILATION are those of rows."""
    REACH: tl.constexpr = (DOWN - 1) * DILATION // STRIDE
    split = tl.program_id(2)
    first_a = tl.program_id(1) // blocks_across * DOWN
    first_b = tl.program_id(1) % blocks_across * ACROSS
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if rows is not None:
        source = tl.load(rows + channel, mask=channel < k, other=0)
    else:
        source = channel.to(tl.int64)
    x_channels = (channel // multiplier).to(tl.int64) * x_channel
    dy_channels = source * dy_channel
    zeros = tl.zeros((LANES, CHANNELS), dtype=tl.float32)
    sums = repeated(zeros, DOWN * ACROSS)
    last = tl.minimum(split * steps + steps, tl.cdiv(lanes, LANES) * chunks)
    for step in range(split * steps, last):
        lane = step // chunks * LANES + tl.arange(0, LANES)
        image = (lane // out_width).to(tl.int64)
        q = lane % out_width
        begin = step % chunks * depth
        end = tl.minimum(begin + depth, out_height)
        column = q * stride_width - left + first_b * dilation_width
        there = (lane < lanes)[:, None] & (channel < k)[None, :]
        inside = lanes_inside(there, column, width, dilation_width, ACROSS, MASKED)
        gradients = dy + (image * dy_image + q * dy_column)[:, None] + dy_channels[None, :]
        values = x + (image * x_image + column * x_column)[:, None] + x_channels[None, :]
        held = repeated(zeros, REACH + 1)
        for v in tl.range(begin, end + REACH, loop_unroll_factor=UNROLL):
            gradient = tl.load(gradients + v * dy_row, mask=there & (v < end), other=0.0)
            held = pushed(held, gradient.to(tl.float32), REACH + 1)
            first = v * STRIDE - top + first_a * DILATION
            x_tap = dilation_width * x_column
            read = new_rows(values, inside, first, height, x_row, x_tap, STRIDE, DILATION, DOWN, ACROSS)
            sums = added(sums, held, read, STRIDE, DILATION, DOWN, ACROSS)
    target = products + (split * k + channel) * (kernel_height * kernel_width)
    for a in tl.static_range(DOWN):
        for b in tl.static_range(ACROSS):
            tap = (first_a + a) * kernel_width + first_b + b
            exists = (first_a + a < kernel_height) & (first_b + b < kernel_width)
            total = tl.sum(sums[a * ACROSS + b], 0)
            tl.store(target + tap, total.to(products.dtype.element_ty), mask=(channel < k) & exists)


def taps_of(kernel: int) -> int:
    """Taps of a program along one side of a filter: equal blocks of at most TAPS."""
    return ceil_div(kernel, ceil_div(kernel, TAPS))


def depthwise_gradient(
    x: Tensor, dy: Tensor, rows: Tensor | None, k: int, geometry: Geometry, dw: Tensor
) -> bool:
    """Fill dw [k, 1, kh, kw] (dense); False, and nothing is done, where the table leaves the call to others."""
    _, _, kh, kw = dw.shape
    down, across = taps_of(kh), taps_of(kw)
    blocks_down, blocks_across = ceil_div(kh, down), ceil_div(kw, across)
    lanes = dy.shape[0] * dy.shape[3]
    last = int(x.stride(1) == 1 and x.shape[1] > 1)
    chosen = config(
        "depthwise_dw", x, last=last, channels=k, lanes=lanes, taps=down * across, bytes=x.dtype.itemsize,
        share=k / dy.shape[1],
    )  # fmt: skip
    if chosen is None:
        return False
    x = pad(x, geometry)
    tiles = ceil_div(k, chosen.tile["CHANNELS"]) * blocks_down * blocks_across
    strips = ceil_div(lanes, chosen.tile["LANES"])
    gathered = lanes * dy.shape[2] * k * dw.dtype.itemsize
    wanted = min(ceil_div(PROGRAMS, tiles), most_splits(4 * dw.numel(), gathered))
    depth = ceil_div(dy.shape[2], max(1, min(ceil_div(wanted, strips), dy.shape[2] // DEPTH)))
    chunks = ceil_div(dy.shape[2], depth)
    steps = ceil_div(strips * chunks, wanted)
    splits = ceil_div(strips * chunks, steps)
    products = dw
    if splits > 1:
        products = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
    top, left = geometry.inner_padding
    masked = left > 0 or across * blocks_across > kw
    launch(
        partial_filters, (ceil_div(k, chosen.tile["CHANNELS"]), blocks_down * blocks_across, splits), chosen,
        {"STRIDE": geometry.stride[0], "DILATION": geometry.dilation[0], "DOWN": down, "ACROSS": across,
         "MASKED": masked},
        x=x, dy=dy, rows=rows, products=products,
        k=k, multiplier=k // x.shape[1], lanes=lanes, chunks=chunks, depth=depth, steps=steps,
        blocks_across=blocks_across, height=x.shape[2], width=x.shape[3],
        out_height=dy.shape[2], out_width=dy.shape[3], kernel_height=kh, kernel_width=kw,
        top=top, left=left, stride_width=geometry.stride[1], dilation_width=geometry.dilation[1],
        x_image=x.stride(0), x_channel=x.stride(1), x_row=x.stride(2), x_column=x.stride(3),
        dy_image=dy.stride(0), dy_channel=dy.stride(1), dy_row=dy.stride(2), dy_column=dy.stride(3),
    )  # fmt: skip
    if splits > 1:
        sum_of_splits(products, dw)
    return True
