"""write_back in Triton: the trained slices of all layers of a network into their full weights, in one launch.

    full[place(a, b, c) + channel] = part[a, b, c] for every layer; one of the three axes is that of the channels

A table in device memory has a row of numbers for each layer: the addresses of its weight, slices and index, its sizes
and strides. Another says to each program which layer it works on, and on which block of it. Both are kept for later
calls with the same tensors, up to TABLES of them, of which the one that was not used for longest goes first: a forward
neither makes nor copies them again. Nothing is written outside a weight, whatever an index holds.

Nobody has measured yet whether one launch beats a copy per layer. So the shipped table gives every call to plain
PyTorch, and only `backend.forced("triton")` or another table brings it here.

Moves   2 e k C_in/g kh kw + 8 k bytes per layer        computes   three integer divisions per element
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.triton.launch import TYPES, ceil_div, config, launch
from sparse_bwd.ops.triton.response import walk_of

TABLES = 32
FIELDS = tl.constexpr(19)  # of a row: three addresses, then a Slot
LARGEST = 2**31 - 1  # number of elements, and a group that holds every channel


@triton.jit
def field(row, number):
    """A number of a layer that fits 32 bits."""
    return tl.load(row + number).to(tl.int32)


@triton.jit
def copy_slices(table, blocks, ELEMENT: tl.constexpr, VALUES: tl.constexpr):
    """VALUES elements of the slices of one layer."""
    block = blocks + 2 * tl.program_id(0)
    row = table + tl.load(block) * FIELDS
    full = tl.load(row).to(tl.pointer_type(ELEMENT))
    part = tl.load(row + 1).to(tl.pointer_type(ELEMENT))
    address = tl.load(row + 2)
    middle, inner = field(row, 4), field(row, 5)
    element = field(block, 1) * VALUES + tl.arange(0, VALUES)
    inside = element < field(row, 3) * middle * inner
    c, others = element % inner, element // inner
    a, b = others // middle, others % middle
    value = tl.load(part + (a * field(row, 6) + b * field(row, 7) + c * field(row, 8)), mask=inside)
    channel = (a * field(row, 9) + b * field(row, 10) + c * field(row, 11)).to(tl.int64)
    if address != 0:
        channel = tl.load(address.to(tl.pointer_type(tl.int64)) + channel, mask=inside, other=-1)
    inside = inside & (channel >= 0) & (channel < field(row, 15))
    channel = channel.to(tl.int32)
    group, within = channel // field(row, 16), channel % field(row, 16)
    place = a * field(row, 12) + b * field(row, 13) + c * field(row, 14)
    tl.store(full + (place + group * field(row, 17) + within * field(row, 18)), value, mask=inside)


class Slot(NamedTuple):
    """Where the slices of a layer belong. Of three numbers each, one is for each axis, outer to inner in memory."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # of the slices
    counts: tuple[int, ...]  # how far the number of the channel goes: 1 for the axis of channels, else 0
    places: tuple[int, ...]  # strides of the weight, but 0 for the axis of channels
    channels: int  # of the weight
    per_group: int  # channel c is number c % per_group of group c // per_group
    group: int  # from a group to the next in the weight
    channel: int  # from a channel to the next in its group


Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@functools.lru_cache(maxsize=4096)
def slot_of(full: Layout, part: Layout, count: int | None, dim: int, groups: int) -> Slot | None:
    """Where `count` slices (None = all) belong in a weight; None where they do not fit, or where axes do not merge."""
    weight, slices = (_three_axes(*layout) for layout in (full, part))
    whole, walk = walk_of(weight), walk_of(slices)
    if whole is None or walk is None or max(weight.numel(), slices.numel()) > LARGEST:
        return None
    rows, columns, grouped = *weight.shape[:2], dim == 1 and groups > 1
    outs = rows // groups if grouped else rows
    k = weight.shape[dim] * (groups if grouped else 1) if count is None else count
    if grouped:
        expected, axis, places = (k, outs), 0, (0, whole.image)
    elif dim == 1:
        expected, axis, places = (rows, k), 1, (whole.image, 0)
    else:
        expected, axis, places = (k, columns), 0, (0, whole.channel)
    if tuple(slices.shape) != (*expected, *weight.shape[2:]):
        return None
    sizes = (*expected, slices.shape[2:].numel())
    counts = (1 - axis, axis, 0)
    axes = zip(walk, sizes, counts, (*places, whole.position), strict=True)
    strides, sizes, counts, places = zip(*sorted(axes, reverse=True), strict=True)
    return Slot(
        sizes,
        strides,
        counts,
        places,
        channels=weight.shape[dim] * (groups if grouped else 1),
        per_group=columns if grouped else LARGEST,
        group=outs * whole.image if grouped else 0,
        channel=whole.channel if dim == 1 else whole.image,
    )


def _three_axes(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """A tensor without data of this layout; a bias becomes a column."""
    x = torch.empty_strided(shape, strides, device="meta")
    return x[:, None] if x.dim() == 1 else x


@functools.lru_cache(maxsize=TABLES)
def tables(
    rows: tuple[tuple[int, int, int, Slot], ...], values: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A row [FIELDS] for each layer; and layer and block for each program, which takes `values` elements."""
    numbers = [[*addresses, *(n for part in slot for n in _flat(part))] for *addresses, slot in rows]
    blocks = [
        (layer, block)
        for layer, (*_, slot) in enumerate(rows)
        for block in range(ceil_div(math.prod(slot.sizes), values))
    ]
    return (
        torch.tensor(numbers, dtype=torch.int64, device=device),
        torch.tensor(blocks, dtype=torch.int64, device=device).reshape(-1, 2),
    )


def _flat(part: int | tuple[int, ...]) -> tuple[int, ...]:
    return part if isinstance(part, tuple) else (part,)


def rows_of(
    weights: Sequence[Tensor],
    slices: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    groups: Sequence[int],
) -> tuple[tuple[int, int, int, Slot], ...] | None:
    """Addresses and slot of every layer; None where one cannot be served."""
    rows = []
    for full, part, index, dim, group in zip(weights, slices, indices, dims, groups, strict=True):
        if index is not None and not (
            index.dtype is torch.int64 and index.dim() == 1 and index.is_contiguous()
        ):
            return None
        if full.dtype is not weights[0].dtype or part.dtype is not full.dtype or full.device != part.device:
            return None
        count = None if index is None else index.numel()
        slot = slot_of((full.shape, full.stride()), (part.shape, part.stride()), count, dim, group)
        if slot is None:
            return None
        rows.append((full.data_ptr(), part.data_ptr(), 0 if index is None else index.data_ptr(), slot))
    return tuple(rows)


def write_back(
    weights: Sequence[Tensor],
    slices: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    groups: Sequence[int],
) -> None:
    rows = rows_of(weights, slices, indices, dims, groups) if weights[0].dtype in TYPES else None
    chosen = config("write_back", weights[0])
    if rows is None or chosen is None:
        return NotImplemented
    table, blocks = tables(rows, chosen.tile["VALUES"], weights[0].device)
    if blocks.numel():
        element = tl.int32 if weights[0].dtype is torch.float32 else tl.int16
        launch(copy_slices, (blocks.shape[0],), chosen, {"ELEMENT": element}, table=table, blocks=blocks)
    return None
