"""linear_dw in Triton: the gather of dy's channels is part of the product, and so is the sum for the bias.

    dw[k, c] = sum over images n and positions p of dy[n, p, rows[k]] x[n, p, c]        db[k] = sum of dy[n, p, rows[k]]

x and dy are given by three strides each, so that the same kernel serves a Linear, and 1x1 convolutions in NCHW and in
channels_last without a copy. k and c are small, n p is up to millions: it is cut into splits, whose float32 partial
results a second kernel adds in order.

Moves   e N P (C + k) + splits 4 k C bytes twice        multiplies   N P k C
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.triton.launch import TYPES, ceil_div, config, launch, precision
from sparse_bwd.ops.triton.splits import most_splits, sum_of_splits
from sparse_bwd.ops.tuning import Config

PROGRAMS = 528  # to have at least, by splitting: four for each multiprocessor of the largest GPUs
STEPS = 8  # of a split, at least


@triton.jit
def partial_products(
    x, dy, rows, products, sums,
    images, positions, k, channels, steps,
    x_image, x_position, x_channel, dy_image, dy_position, dy_channel,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Products of one tile of rows and columns over one split of the positions; `steps` of them in each split."""
    split = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = tl.arange(0, POSITIONS)
    if rows is not None:
        source = tl.load(rows + row, mask=row < k, other=0).to(tl.int32)
    else:
        source = row
    per_image = tl.cdiv(positions, POSITIONS)
    first = split * steps
    last = tl.minimum(first + steps, images * per_image)
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for step in range(first, last):
        image = (step // per_image).to(tl.int64)
        start = step % per_image * POSITIONS
        inside = start + here < positions
        dy_base = dy + image * dy_image + start.to(tl.int64) * dy_position
        x_base = x + image * x_image + start.to(tl.int64) * x_position
        gradient = tl.load(
            dy_base + source[:, None] * dy_channel + here[None, :] * dy_position,
            mask=(row < k)[:, None] & inside[None, :],
            other=0.0,
        )
        value = tl.load(
            x_base + here[:, None] * x_position + column[None, :] * x_channel,
            mask=inside[:, None] & (column < channels)[None, :],
            other=0.0,
        )
        product = tl.dot(gradient, value, product, input_precision=PRECISION)
        if sums is not None:
            total += tl.sum(gradient.to(tl.float32), 1)
    target = products + split * k * channels
    tl.store(
        target + row[:, None] * channels + column[None, :],
        product.to(products.dtype.element_ty),
        mask=(row < k)[:, None] & (column < channels)[None, :],
    )
    if sums is not None:
        if tl.program_id(1) == 0:
            tl.store(sums + split * k + row, total.to(sums.dtype.element_ty), mask=row < k)


@triton.jit
def add_splits_with_statistics(
    products, sums, dw, db, previous, weight, statistics, splits, size, k, channels,
    previous_row, previous_channel, weight_row, weight_channel, VALUES: tl.constexpr,
):  # fmt: skip
    """One row of dw and db, and |dw|^2, <dw, previous>, <weight, dw> of that row, of dw as it is stored."""
    row = tl.program_id(0)
    here = tl.arange(0, VALUES)
    squares = tl.zeros((VALUES,), dtype=tl.float32)
    changes = tl.zeros((VALUES,), dtype=tl.float32)
    weights = tl.zeros((VALUES,), dtype=tl.float32)
    for start in range(0, channels, VALUES):
        inside = start + here < channels
        place = row * channels + start + here
        value = tl.zeros((VALUES,), dtype=tl.float32)
        for split in range(splits):
            value += tl.load(products + split * size + place, mask=inside, other=0.0)
        stored = value.to(dw.dtype.element_ty)
        tl.store(dw + place, stored, mask=inside)
        value = stored.to(tl.float32)
        squares += value * value
        if previous is not None:
            changes += value * tl.load(
                previous + row * previous_row + (start + here) * previous_channel, mask=inside, other=0.0
            ).to(tl.float32)
        if weight is not None:
            weights += value * tl.load(
                weight + row * weight_row + (start + here) * weight_channel, mask=inside, other=0.0
            ).to(tl.float32)
    tl.store(statistics + row, tl.sum(squares))
    tl.store(statistics + k + row, tl.sum(changes))
    tl.store(statistics + 2 * k + row, tl.sum(weights))
    if db is not None:
        total = tl.load(sums + row) * 0.0
        for split in range(splits):
            total += tl.load(sums + split * k + row)
        tl.store(db + row, total.to(db.dtype.element_ty))


class Walk(NamedTuple):
    """Sizes of a product and the strides of its operands, in elements."""

    images: int
    positions: int
    channels: int
    x: tuple[int, int, int]  # image, position, channel
    dy: tuple[int, int, int]


def of_pixels(x: Tensor, dy: Tensor) -> Walk:
    """A Linear: x [M, C] and dy [M, C_out]."""
    return Walk(1, x.shape[0], x.shape[1], (0, x.stride(0), x.stride(1)), (0, dy.stride(0), dy.stride(1)))


def splits_of(steps: int, tiles: int, part: int, gathered: int) -> int:
    """Into how many parts the positions are cut: from the shape alone, so that every GPU adds in the same order.

    Args:
        steps: over all positions.
        tiles: of the result, each a program of its own.
        part, gathered: bytes, as `most_splits` takes them.
    """
    return max(1, min(ceil_div(PROGRAMS, tiles), steps // STEPS, most_splits(part, gathered)))


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    rows: Tensor | None,
    walk: Walk,
    k: int,
    chosen: Config,
    dw: Tensor,
    db: Tensor | None,
    convolution: bool = False,
) -> None:
    """Fill dw [k, C] and db [k], both contiguous."""
    products, sums, splits = partials(x, dy, rows, walk, k, chosen, dw, db, convolution, direct=True)
    if splits > 1:
        sum_of_splits(products, dw)
        if db is not None and sums is not None:
            sum_of_splits(sums, db)


def partials(
    x: Tensor,
    dy: Tensor,
    rows: Tensor | None,
    walk: Walk,
    k: int,
    chosen: Config,
    dw: Tensor,
    db: Tensor | None,
    convolution: bool,
    direct: bool,
) -> tuple[Tensor, Tensor | None, int]:
    """Products [splits, k, C] and sums [splits, k] of every split in float32; a single one goes into dw and db."""
    tile = chosen.tile
    tiles = (ceil_div(k, tile["ROWS"]), ceil_div(walk.channels, tile["COLUMNS"]))
    whole = walk.images * ceil_div(walk.positions, tile["POSITIONS"])
    gathered = walk.images * walk.positions * k * x.dtype.itemsize
    steps = ceil_div(whole, splits_of(whole, tiles[0] * tiles[1], 4 * (dw.numel() + k), gathered))
    splits = ceil_div(whole, steps)
    products, sums = dw, db
    if splits > 1 or not direct:
        products = torch.empty((splits, dw.numel()), dtype=torch.float32, device=x.device)
        sums = None if db is None else torch.empty((splits, k), dtype=torch.float32, device=x.device)
    launch(
        partial_products, (*tiles, splits), chosen, {"PRECISION": precision(x, convolution)},
        x=x, dy=dy, rows=rows, products=products, sums=sums,
        images=walk.images, positions=walk.positions, k=k, channels=walk.channels, steps=steps,
        x_image=walk.x[0], x_position=walk.x[1], x_channel=walk.x[2],
        dy_image=walk.dy[0], dy_position=walk.dy[1], dy_channel=walk.dy[2],
    )  # fmt: skip
    return products, sums, splits


def _prepared(x: Tensor, dy: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, int, Config] | None:
    """x and dy as matrices, k and the configuration; None where others serve the call."""
    if x.dtype not in TYPES or dy.dtype is not x.dtype or x.numel() == 0 or dy.numel() == 0:
        return None
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    k = dy.shape[1] if rows is None else rows.numel()
    if k == 0:
        return None
    size = {"rows": k, "columns": x.shape[1], "share": k / dy.shape[1], "bytes": x.dtype.itemsize}
    chosen = config("linear_dw", x, **size)
    return None if chosen is None else (x, dy, k, chosen)


def linear_dw(x: Tensor, dy: Tensor, rows: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    made = _prepared(x, dy, rows)
    if made is None:
        return NotImplemented
    x, dy, k, chosen = made
    dw, db = x.new_empty(k, x.shape[1]), dy.new_empty(k if bias else 0)
    weight_gradient(x, dy, rows, of_pixels(x, dy), k, chosen, dw, db if bias else None)
    return dw, db


def linear_dw_statistics(
    x: Tensor, dy: Tensor, rows: Tensor | None, bias: bool, previous: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    made = _prepared(x, dy, rows)
    if made is None:
        return NotImplemented
    x, dy, k, chosen = made
    dw, db = x.new_empty(k, x.shape[1]), dy.new_empty(k if bias else 0)
    statistics = torch.empty((3, k), dtype=torch.float32, device=x.device)
    p, w = (dw.stride() if other is None else other.stride() for other in (previous, weight))
    products, sums, splits = partials(
        x, dy, rows, of_pixels(x, dy), k, chosen, dw, db if bias else None, False, direct=False
    )
    launch(
        add_splits_with_statistics, (k,), Config({"VALUES": 256}, 4, 1), {},
        products=products, sums=sums, dw=dw, db=db if bias else None,
        previous=previous, previous_row=p[0], previous_channel=p[1],
        weight=weight, weight_row=w[0], weight_channel=w[1],
        statistics=statistics, splits=splits, size=dw.numel(), k=k, channels=x.shape[1],
    )  # fmt: skip
    return dw, db, statistics
