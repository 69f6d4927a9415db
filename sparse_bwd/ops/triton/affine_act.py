"""affine_act in Triton: frozen batch norm, activation and the flags for backward in one pass, and its gradient.

    y  = act(a[c] x + b[c])        flags: one bit per element, in storage order
    dx = a[c] act'(.) dy           dshift[c] = sum over n, h, w of act'(.) dy

Elements are taken in storage order, c(i) = (i / inner) % C with inner = H W in NCHW and 1 in channels_last, in rows of
eight that share a byte of flags. A division costs as much as all else that an element needs, so a row has one or two
where the shape allows (`of_channel`). With dshift a program keeps to one channel, or to a few neighbouring ones, for
a split of the images, in rows as long as always lie inside one byte; a second kernel adds the splits.

Moves   (2 e + 1/8) Y bytes, forward and backward, dshift or not        computes   Y multiplications and comparisons
"""

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.affine_act import fits, inner_of, mask_for
from sparse_bwd.ops.triton.launch import TYPES, ceil_div, config, launch
from sparse_bwd.ops.triton.splits import sum_of_splits
from sparse_bwd.ops.tuning import Config

LARGEST = 2**30  # elements of an image, or rows of a channel, so that places inside them are 32-bit
PROGRAMS = 2112  # to have at least, by splitting: sixteen for each multiprocessor of the largest GPUs
STEPS = 4  # of a split, at least
SPLITS = 256  # at most
WIDTH = 128  # channels of a program at most, in channels_last


@triton.jit
def of_channel(vector, start, row, inner, channels, WAY: tl.constexpr):
    """vector[c] for rows of eight elements, of which the first begins `start` after the beginning of an image.

    WAY: "pixels" channels_last, C a multiple of 8; "planes" NCHW, H W a multiple of 8; "edges" NCHW, a row crosses one
    edge of a plane at the most; "elements" all others, which divide for each element.
    """
    column = tl.arange(0, 8)
    if WAY == "pixels":
        group = (start // 8 + row) % (channels // 8)
        return tl.load(vector + group[:, None] * 8 + column[None, :])
    elif WAY == "elements":
        place = start + row[:, None] * 8 + column[None, :]
        return tl.load(vector + place // inner % channels)
    else:
        place = start + row * 8
        channel = place // inner
        left = (channel + 1) * inner - place
        channel = channel % channels
        here = tl.load(vector + channel)
        if WAY == "planes":
            return here[:, None]
        else:
            after = tl.load(vector + tl.where(channel + 1 == channels, 0, channel + 1))
            return tl.where(column[None, :] < left[:, None], here[:, None], after[:, None])


@triton.jit
def activated(value, low, high, ACT: tl.constexpr, TYPE: tl.constexpr):
    """act of float32 values [*, *] that are exact in TYPE, and its flags.

    Comparisons with NaN are false: it passes through, and so does its gradient.
    """
    flag = value > 0.0
    if ACT == "relu":
        flag = value <= 0.0
        value = tl.where(value < 0.0, 0.0, value)
    elif ACT == "hardtanh":
        # PyTorch compares with the bounds in the tensor's type.
        least = tl.full((1, 1), low, TYPE).to(tl.float32)
        most = tl.full((1, 1), high, TYPE).to(tl.float32)
        flag = (value <= least) | (value >= most)
        value = tl.where(value < least, least, value)
        value = tl.where(value > most, most, value)
    elif ACT == "leaky_relu":
        value = tl.where(flag, value, value * low)
    return value, flag


@triton.jit
def activate(
    x, y, mask, scale, shift, size, channels, inner, low, high,
    ACT: tl.constexpr, WAY: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """One tile of y and of the flags, which are judged on a x + b as rounded to the type of y."""
    first = tl.program_id(0).to(tl.int64) * ELEMENTS
    row = tl.arange(0, ELEMENTS // 8)
    column = tl.arange(0, 8)
    here = row[:, None] * 8 + column[None, :]
    inside = first + here < size
    value = tl.load(x + first + here, mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        start = (first % (channels * inner)).to(tl.int32)
        a = of_channel(scale, start, row, inner, channels, WAY)
        b = of_channel(shift, start, row, inner, channels, WAY)
        value = (value * a + b).to(y.dtype.element_ty).to(tl.float32)
    value, flag = activated(value, low, high, ACT, y.dtype.element_ty)
    tl.store(y + first + here, value.to(y.dtype.element_ty), mask=inside)
    if mask is not None:
        byte = tl.sum(flag.to(tl.int32) << column[None, :], 1)
        left = size - first - row * 8
        within = tl.minimum(tl.maximum(left, 0), 8).to(tl.int32)
        byte = byte & ((1 << within) - 1)
        tl.store(mask + first // 8 + row, byte.to(tl.uint8), mask=left > 0)


@triton.jit
def pass_back(dy, flags, a, slope, ACT: tl.constexpr):
    """g = act' dy, and a g; exactly 0 where relu and hardtanh let nothing through, whatever dy and a are."""
    gradient = dy
    if flags is not None:
        if ACT == "leaky_relu":
            gradient = tl.where(flags != 0, dy, dy * slope)
        else:
            gradient = tl.where(flags != 0, 0.0, dy)
    scaled = gradient
    if a is not None:
        scaled = gradient * a
        if flags is not None:
            if ACT != "leaky_relu":
                scaled = tl.where(flags != 0, 0.0, scaled)
    return gradient, scaled


@triton.jit
def gradient(
    dy, dx, mask, scale, size, channels, inner, slope,
    ACT: tl.constexpr, WAY: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """One tile of dx."""
    first = tl.program_id(0).to(tl.int64) * ELEMENTS
    row = tl.arange(0, ELEMENTS // 8)
    column = tl.arange(0, 8)
    here = row[:, None] * 8 + column[None, :]
    inside = first + here < size
    value = tl.load(dy + first + here, mask=inside, other=0.0).to(tl.float32)
    flags = None
    if mask is not None:
        byte = tl.load(mask + first // 8 + row, mask=first + row * 8 < size, other=0)
        flags = byte.to(tl.int32)[:, None] >> column[None, :] & 1
    a = None
    if scale is not None:
        start = (first % (channels * inner)).to(tl.int32)
        a = of_channel(scale, start, row, inner, channels, WAY)
    _, scaled = pass_back(value, flags, a, slope, ACT)
    tl.store(dx + first + here, scaled.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def gradient_of_planes(
    dy, dx, mask, scale, sums, images, channels, length, steps, slope,
    ACT: tl.constexpr, UNIT: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """dx and the sum of one channel over one split of the images; planes are `length` rows of UNIT elements."""
    ROWS: tl.constexpr = ELEMENTS // UNIT
    channel = tl.program_id(0)
    split = tl.program_id(1)
    here = tl.arange(0, ROWS)
    column = tl.arange(0, UNIT)
    rows = images * length
    a = None
    if scale is not None:
        a = tl.load(scale + channel)
    total = tl.zeros((ROWS, UNIT), dtype=tl.float32)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(rows, ROWS))
    for step in range(first, last):
        row = step * ROWS + here
        inside = row < rows
        plane = (row // length).to(tl.int64) * channels + channel
        start = (plane * length + row % length) * UNIT
        place = start[:, None] + column[None, :]
        value = tl.load(dy + place, mask=inside[:, None], other=0.0).to(tl.float32)
        flags = None
        if mask is not None:
            byte = tl.load(mask + start // 8, mask=inside, other=0).to(tl.int32)
            flags = (byte >> (start % 8).to(tl.int32))[:, None] >> column[None, :] & 1
        passed, scaled = pass_back(value, flags, a, slope, ACT)
        total += passed
        tl.store(dx + place, scaled.to(dx.dtype.element_ty), mask=inside[:, None])
    tl.store(sums + split * channels + channel, tl.sum(total))


@triton.jit
def gradient_of_pixels(
    dy, dx, mask, scale, sums, pixels, groups, steps, slope,
    ACT: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """dx and the sums of GROUPS UNIT channels over one split of the pixels; a pixel has `groups` rows of UNIT."""
    COLUMNS: tl.constexpr = GROUPS * UNIT
    PIXELS: tl.constexpr = ELEMENTS // COLUMNS
    split = tl.program_id(1)
    channels = groups * UNIT
    here = tl.arange(0, PIXELS)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a = None
    if scale is not None:
        a = tl.load(scale + channel, mask=channel < channels, other=0.0)[None, :]
    total = tl.zeros((PIXELS, COLUMNS), dtype=tl.float32)
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(pixels, PIXELS))
    base = split.to(tl.int64) * steps * PIXELS * channels
    for step in range(first, last):
        known = step * PIXELS + here < pixels
        inside = known[:, None] & (channel < channels)[None, :]
        place = here[:, None] * channels + channel[None, :]
        value = tl.load(dy + base + place, mask=inside, other=0.0).to(tl.float32)
        flags = None
        if mask is not None:
            start = (base % 8).to(tl.int32) + here[:, None] * channels + group[None, :] * UNIT
            byte = tl.load(
                mask + base // 8 + start // 8, mask=known[:, None] & (group < groups)[None, :], other=0
            )
            bits = (byte.to(tl.int32) >> start % 8)[:, :, None] >> tl.arange(0, UNIT)[None, None, :] & 1
            flags = tl.reshape(bits, (PIXELS, COLUMNS))
        passed, scaled = pass_back(value, flags, a, slope, ACT)
        total += passed
        tl.store(dx + base + place, scaled.to(dx.dtype.element_ty), mask=inside)
        base += PIXELS * channels
    tl.store(sums + split * channels + channel, tl.sum(total, 0), mask=channel < channels)


class Call(NamedTuple):
    """What a launch needs to know: how x lies in storage, and the configuration."""

    channels: int
    inner: int
    chosen: Config

    @property
    def way(self) -> str:
        """How `of_channel` finds the channel of an element."""
        if self.inner == 1 and self.channels % 8 == 0:
            return "pixels"
        if self.inner < 8:
            return "elements"
        return "edges" if self.inner % 8 else "planes"


def _prepared(table: str, x: Tensor, *vectors: Tensor | None) -> Call | None:
    """None where others serve the call."""
    if x.dtype not in TYPES or x.numel() == 0 or not all(map(fits, vectors)):
        return None
    inner, channels = inner_of(x), x.shape[1] if x.dim() > 1 else 1
    if not inner or max(channels * inner, x.numel() // channels) > LARGEST:
        return None
    chosen = config(table, x, bytes=x.dtype.itemsize)
    return None if chosen is None else Call(channels, inner, chosen)


def _activate(
    x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float,
    keep: bool, call: Call,
) -> Tensor:  # fmt: skip
    """Fill y and return the flags."""
    mask = mask_for(y, act, keep)
    launch(
        activate, (ceil_div(x.numel(), call.chosen.tile["ELEMENTS"]),), call.chosen,
        {"ACT": act, "WAY": call.way},
        x=x, y=y, mask=mask if mask.numel() else None, scale=scale, shift=shift,
        size=x.numel(), channels=call.channels, inner=call.inner, low=low, high=high,
    )  # fmt: skip
    return mask


def affine_act(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float, keep: bool
) -> tuple[Tensor, Tensor]:
    call = _prepared("affine_act", x, scale, shift)
    if call is None or (scale is None) is not (shift is None):
        return NotImplemented
    y = torch.empty_like(x)
    return y, _activate(x, y, scale, shift, act, low, high, keep, call)


def affine_act_(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float, keep: bool
) -> Tensor:
    call = _prepared("affine_act", x, scale, shift)
    if call is None or (scale is None) is not (shift is None):
        return NotImplemented
    return _activate(x, x, scale, shift, act, low, high, keep, call)


def affine_act_dx(
    dy: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    act: str,
    slope: float,
    strides: Sequence[int],
    shift_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_strided(dy.shape, tuple(strides), dtype=dy.dtype, device=dy.device)
    call = _prepared("affine_act_shift" if shift_gradient else "affine_act_dx", dx, scale)
    if call is None:
        return NotImplemented
    source = dy if dy.stride() == dx.stride() else dx.copy_(dy)
    given = {"dy": source, "dx": dx, "mask": mask, "scale": scale, "slope": slope}
    if shift_gradient:
        return dx, _with_sums(given, act, call)
    launch(
        gradient, (ceil_div(dx.numel(), call.chosen.tile["ELEMENTS"]),), call.chosen,
        {"ACT": act, "WAY": call.way},
        **given, size=dx.numel(), channels=call.channels, inner=call.inner,
    )  # fmt: skip
    return dx, dy.new_empty(0)


def _with_sums(given: dict[str, Any], act: str, call: Call) -> Tensor:
    """Fill dx and return dshift [C]."""
    dx, channels = given["dx"], call.channels
    unit = gcd(channels if call.inner == 1 else call.inner, 8)
    rows = dx.numel() // channels
    if call.inner == 1:
        groups = channels // unit
        width = _groups(groups, min(WIDTH, call.chosen.tile["ELEMENTS"]) // unit)
        tiles, per_step = ceil_div(groups, width), call.chosen.tile["ELEMENTS"] // (width * unit)
    else:
        tiles, per_step = channels, call.chosen.tile["ELEMENTS"] // unit
        rows //= unit
    steps = _steps(ceil_div(rows, per_step), tiles)
    splits = ceil_div(ceil_div(rows, per_step), steps)
    dshift = torch.empty(channels, dtype=torch.float32, device=dx.device)
    sums = dshift if splits == 1 else dshift.new_empty(splits, channels)
    if call.inner == 1:
        launch(
            gradient_of_pixels, (tiles, splits), call.chosen, {"ACT": act, "UNIT": unit, "GROUPS": width},
            **given, sums=sums, pixels=rows, groups=groups, steps=steps,
        )  # fmt: skip
    else:
        length = call.inner // unit
        launch(
            gradient_of_planes, (tiles, splits), call.chosen, {"ACT": act, "UNIT": unit},
            **given, sums=sums, images=rows // length, channels=channels, length=length, steps=steps,
        )  # fmt: skip
    if splits > 1:
        sum_of_splits(sums, dshift)
    return dshift


def _groups(groups: int, most: int) -> int:
    """The largest power of two up to `most` that leaves at most a quarter of the tiles' columns without work."""
    width = most
    while ceil_div(groups, width) * width * 3 > groups * 4:
        width //= 2
    return width


def _steps(whole: int, tiles: int) -> int:
    """Steps of a split, from the shape alone, so that every GPU adds in the same order."""
    splits = max(1, min(ceil_div(PROGRAMS, tiles), whole // STEPS, SPLITS))
    return ceil_div(whole, splits)
