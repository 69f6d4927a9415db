"""conv2d_dw in Triton: as a product where it is one, depthwise in `depthwise.py`, and else as an implicit product.

    dw[k, (c, a, b)] = sum over images n and outputs (p, q) of
                       dy[n, rows[k], p, q] x[n, c, p stride - pad + a dilation, q stride - pad + b dilation]

The columns (c, a, b) of the product are in the memory order of dw, so that in channels_last neighbouring columns are
neighbours in x. What a tile of them reads is computed from the places of its taps and of its outputs; nothing is
unfolded in memory, and the gathers of rows (of dy) and spread (of x) are part of the reading. Outputs of all images are
one range, which is cut into splits as in `linear_dw.py`. In grouped layers each group is a product of its own.

Moves     e N P_x C kh kw (ceil(k / ROWS), mostly from the cache) + e N P k + splits 4 k C kh kw bytes twice
multiplies N P k C kh kw        with C input channels and k rows per group, times the groups
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.conv2d_dw import arranged, memory_format_of
from sparse_bwd.ops.padding import Geometry, pad
from sparse_bwd.ops.triton.depthwise import depthwise_gradient
from sparse_bwd.ops.triton.launch import TYPES, ceil_div, config, launch, precision
from sparse_bwd.ops.triton.linear_dw import Walk, splits_of, weight_gradient
from sparse_bwd.ops.triton.splits import sum_of_splits
from sparse_bwd.ops.tuning import Config

FEW = 16  # rows of dy per channel of x, from which a product of matrices is worth its while
LARGEST = (
    2**30
)  # offset inside what a step reads, and number of outputs: half of what 32 bits hold, for padding
AWAY = tl.constexpr(-(2**30))  # far outside of every image
STEP = 128  # outputs of a step, at most


@triton.jit
def located(place, out_height, out_width):
    """Image, row and column of an output from its place among all."""
    line = place // out_width
    image = line // out_height
    return image, line - image * out_height, place - line * out_width


@triton.jit
def moved(image, p, q, far, down, right, out_height, out_width):
    """The output that is `far` images, `down` rows and `right` columns, each less than there are, behind another."""
    q += right
    over = (q >= out_width).to(tl.int32)
    p += down + over
    above = (p >= out_height).to(tl.int32)
    return image + far + above, p - above * out_height, q - over * out_width


@triton.jit
def tap_values(x, place, y, z, there, offset, down, across, known, height, width, PADDED: tl.constexpr):
    """What taps read for outputs: of outputs where tap (0, 0) is, of taps how far from it they are."""
    if PADDED:  # a negative number is a large one without a sign; what is not there is AWAY
        mask = ((y + down).to(tl.uint32) < height) & ((z + across).to(tl.uint32) < width)
    else:
        mask = there & known
    return tl.load(x + (place + offset), mask=mask, other=0.0)


@triton.jit
def partial_convolutions(
    x, dy, spread, rows, products,
    outputs, k, channels, steps,
    height, width, out_height, out_width, kernel_height, kernel_width,
    stride_height, stride_width, top, left, dilation_height, dilation_width,
    x_image, x_channel, x_row, x_column, dy_image, dy_channel, dy_row, dy_column,
    PRECISION: tl.constexpr, PADDED: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Products of one tile of a group's rows and columns over one split; LAST: dw is in channels_last."""
    blocks = tl.cdiv(k, ROWS)
    group = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    taps = kernel_height * kernel_width
    columns = channels * taps
    if LAST:
        channel = column % channels
        tap = column // channels
    else:
        channel = column // taps
        tap = column % taps
    down = tap // kernel_width * dilation_height
    across = tap % kernel_width * dilation_width
    source = group * k + row
    if rows is not None:
        source = tl.load(rows + source, mask=row < k, other=0).to(tl.int32)
    channel += group * channels
    if spread is not None:
        channel = tl.load(spread + channel, mask=column < columns, other=0).to(tl.int32)
    dy_rows = source * dy_channel
    x_columns = channel * x_channel + down * x_row + across * x_column
    down = tl.where(column < columns, down, AWAY)
    split = tl.program_id(2)
    last = tl.minimum(split * steps + steps, tl.cdiv(outputs, POSITIONS))
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    first = split * steps * POSITIONS
    # Outputs are followed from step to step without a division, once for each tensor: in the layout of its loads.
    # Offsets count from the first image of a step, so that 32 bits hold them.
    far, low, right = located(POSITIONS, out_height, out_width)
    image, p, q = located(first, out_height, out_width)
    dy_image_at, dy_p, dy_q = located(first + tl.arange(0, POSITIONS), out_height, out_width)
    x_image_at, x_p, x_q = located(first + tl.arange(0, POSITIONS), out_height, out_width)
    for step in range(split * steps, last):
        there = step * POSITIONS + tl.arange(0, POSITIONS) < outputs
        dy_place = (dy_image_at - image) * dy_image + dy_p * dy_row + dy_q * dy_column
        gradient = tl.load(
            dy + image.to(tl.int64) * dy_image + (dy_place[None, :] + dy_rows[:, None]),
            mask=(row < k)[:, None] & there[None, :],
            other=0.0,
        )
        y = x_p * stride_height - top
        z = x_q * stride_width - left
        x_place = (x_image_at - image) * x_image + y * x_row + z * x_column
        y = tl.where(there, y, AWAY)
        x_base = x + image.to(tl.int64) * x_image
        # Threads side by side take the last dimension, where the compiler cannot see what is adjacent in memory.
        if LAST:
            value = tap_values(
                x_base, x_place[:, None], y[:, None], z[:, None], there[:, None],
                x_columns[None, :], down[None, :], across[None, :], (column < columns)[None, :],
                height, width, PADDED,
            )  # fmt: skip
        else:
            value = tap_values(
                x_base, x_place[None, :], y[None, :], z[None, :], there[None, :],
                x_columns[:, None], down[:, None], across[:, None], (column < columns)[:, None],
                height, width, PADDED,
            ).T  # fmt: skip
        product = tl.dot(gradient, value, product, input_precision=PRECISION)
        image, p, q = moved(image, p, q, far, low, right, out_height, out_width)
        dy_image_at, dy_p, dy_q = moved(dy_image_at, dy_p, dy_q, far, low, right, out_height, out_width)
        x_image_at, x_p, x_q = moved(x_image_at, x_p, x_q, far, low, right, out_height, out_width)
    target = products + (split * (tl.num_programs(0) // blocks) + group) * k * columns
    tl.store(
        target + row[:, None] * columns + column[None, :],
        product.to(products.dtype.element_ty),
        mask=(row < k)[:, None] & (column < columns)[None, :],
    )


def product_of(x: Tensor, dy: Tensor) -> Walk | None:
    """A 1x1 convolution without stride and padding; None where pixels do not follow each other at one distance."""
    steps: list[tuple[int, int, int]] = []
    for each in (x, dy):
        image, channel, row, column = each.stride()
        _, _, height, width = each.shape
        position = image if height == width == 1 else column if width > 1 else row
        if height > 1 and row != width * position:
            return None
        steps.append((image, position, channel))
    images, channels, height, width = x.shape
    if all(image == height * width * position for image, position, _ in steps):
        steps = [(0, position, channel) for _, position, channel in steps]
        return Walk(1, images * height * width, channels, *steps)
    return Walk(images, height * width, channels, *steps)


def _config(x: Tensor, dy: Tensor, dw: Tensor, implicit: int, groups: int) -> Config | None:
    """The table's answer for a product of dw.shape[0] / groups rows; `tap` is the share of one tap in the kernel."""
    k, channels, kh, kw = dw.shape
    return config(
        "conv2d_dw", x, implicit=implicit, groups=groups, tap=1 / (kh * kw), rows=k // groups,
        columns=channels * kh * kw, share=k / dy.shape[1], bytes=x.dtype.itemsize,
    )  # fmt: skip


def product_gradient(x: Tensor, dy: Tensor, rows: Tensor | None, walk: Walk, dw: Tensor) -> bool:
    """Fill dw [k, C, 1, 1]; False, and nothing is done, where the table leaves the call to others."""
    chosen = _config(x, dy, dw, implicit=0, groups=1)
    if chosen is None:
        return False
    weight_gradient(x, dy, rows, walk, dw.shape[0], chosen, dw, None, convolution=True)
    return True


def convolution_gradient(
    x: Tensor,
    dy: Tensor,
    spread: Tensor | None,
    rows: Tensor | None,
    geometry: Geometry,
    dw: Tensor,
    last: bool,
) -> bool:
    """Fill dw [k, C, kh, kw], dense and in channels_last or not (`last`); False as above."""
    channels, kh, kw = dw.shape[1:]
    k = dw.shape[0] // geometry.groups
    chosen = _config(x, dy, dw, implicit=1, groups=geometry.groups)
    if chosen is None:
        return False
    x = pad(x, geometry)
    tile, outputs = chosen.tile, dy.shape[0] * dy.shape[2] * dy.shape[3]
    tiles = geometry.groups * ceil_div(k, tile["ROWS"]), ceil_div(channels * kh * kw, tile["COLUMNS"])
    whole = ceil_div(outputs, tile["POSITIONS"])
    gathered = outputs * len(dw) * dw.dtype.itemsize
    steps = ceil_div(whole, splits_of(whole, tiles[0] * tiles[1], 4 * dw.numel(), gathered))
    splits = ceil_div(whole, steps)
    products = dw
    if splits > 1:
        products = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
    top, left = geometry.inner_padding
    launch(
        partial_convolutions, (*tiles, splits), chosen,
        {"PRECISION": precision(x, convolution=True), "PADDED": top > 0 or left > 0, "LAST": last},
        x=x, dy=dy, spread=spread, rows=rows, products=products,
        outputs=outputs, k=k, channels=channels, steps=steps, height=x.shape[2], width=x.shape[3],
        out_height=dy.shape[2], out_width=dy.shape[3], kernel_height=kh, kernel_width=kw,
        stride_height=geometry.stride[0], stride_width=geometry.stride[1], top=top, left=left,
        dilation_height=geometry.dilation[0], dilation_width=geometry.dilation[1],
        x_image=x.stride(0), x_channel=x.stride(1), x_row=x.stride(2), x_column=x.stride(3),
        dy_image=dy.stride(0), dy_channel=dy.stride(1), dy_row=dy.stride(2), dy_column=dy.stride(3),
    )  # fmt: skip
    if splits > 1:
        sum_of_splits(products, dw)
    return True


def _serves(x: Tensor, dy: Tensor, k: int) -> bool:
    """Whether the kernels know the dtype, and their numbers of 32 bits hold every offset inside what a step reads."""
    if x.dtype not in TYPES or dy.dtype is not x.dtype or 0 in (x.numel(), dy.numel(), k):
        return False
    images, positions = dy.shape[0], dy.shape[2] * dy.shape[3]
    met = min(images, STEP // positions + 2)
    ends = [sum((n - 1) * s for n, s in zip((met, *t.shape[1:]), t.stride(), strict=True)) for t in (x, dy)]
    return max(*ends, images * positions) < LARGEST


def conv2d_dw(
    x: Tensor,
    dy: Tensor,
    spread: Tensor | None,
    rows: Tensor | None,
    pick: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    padding_mode: str,
    dilation: Sequence[int],
    groups: int,
    regroup: bool,
) -> Tensor:
    geometry = Geometry(tuple(stride), tuple(padding), padding_mode, tuple(dilation), groups)  # type: ignore[arg-type]
    k = dy.shape[1] if rows is None else rows.numel()
    if not _serves(x, dy, k):
        return NotImplemented
    channels = (x.shape[1] if spread is None else spread.numel()) // groups
    layout = memory_format_of(x)
    dw = torch.empty((k, channels, *size[2:]), dtype=x.dtype, device=x.device, memory_format=layout)
    walk = None
    if size[2] == size[3] == groups == 1 and tuple(stride) == (1, 1) and not any(padding):
        walk = product_of(x, dy)
    if walk is not None:
        served = product_gradient(x, dy, rows, walk, dw)
    elif spread is None and x.shape[1] == groups and k < FEW * groups:
        served = depthwise_gradient(x, dy, rows, k, geometry, dw)
    else:
        served = convolution_gradient(x, dy, spread, rows, geometry, dw, layout is torch.channels_last)
    return arranged(dw, pick, groups, regroup, layout) if served else NotImplemented
