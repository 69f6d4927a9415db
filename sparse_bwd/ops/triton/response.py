"""response in Triton: three inner products of the new and the previous response, which the new one overwrites.

    sums[:, n, c] = <new, previous>, |new|^2, |previous|^2 over the positions of channel c        previous <- new

Both responses are read once and the new one is written once, in any layout: they are given by three strides each. A
program takes a tile of channels of one image over a part of the positions; where there are several parts, a second
kernel adds them in order.

A GPU may do float64 at 1/64 of its rate for float32, where sums in float64 would take longer than the reading. So
products, and the sums of the few that one thread holds of a channel in a step, are in float32; everything that is added
to those, over steps, threads and parts, is in float64. Small planes are summed over a tile in float32. At most FEW
roundings lie on the way of a product, each of 2^-24 of sums of absolute values, so that by Cauchy and Schwarz

    error <= 2^-20 |new| |previous|        and the same for the two squares

|new - previous|^2 is added up besides. Where it is small, <new, previous> is derived from it and the two squares, so
that the error of the cosine shrinks with what has changed, to 2^-20 |new - previous| / |new|, since velocity lives on
what the cosine lacks to one; responses that are equal have a cosine of exactly one. Values are expected between 1e-18
and 1e18 in magnitude, or zero: squares of others leave the range of float32. A response that is stored in float64 is
compared in float64 throughout.

`affine_act_response` writes act(scale new + shift) over the new response besides, which it has in registers.

Moves   N k P (e_new + 2 e_previous) bytes, e_new more with an activation        multiplies   4 N k P
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.affine_act import fits
from sparse_bwd.ops.triton.affine_act import activated
from sparse_bwd.ops.triton.launch import TYPES, ceil_div, config, launch
from sparse_bwd.ops.tuning import Config

PROGRAMS = 1056  # to have at least, by splitting: eight for each multiprocessor of the largest GPUs
STEPS = 2  # of a part, at least
NEAR = tl.constexpr(
    1 / 16
)  # |new - previous|^2 over |new|^2, up to which the inner product is derived from it


@triton.jit
def inner_product(dot, now, old, gap):
    """<new, previous> from itself, or where the two are near from |new|^2 + |previous|^2 - |new - previous|^2."""
    return tl.where(gap <= now * NEAR, (now + old - gap) * 0.5, dot)


@triton.jit
def lanes_of(values, LANES: tl.constexpr, ADJACENT: tl.constexpr):
    """Sums [CHANNELS, LANES] in float64 of float32 values [CHANNELS, POSITIONS] that one thread holds, mostly."""
    folds: tl.constexpr = values.shape[1] // (LANES * ADJACENT)
    apart = tl.reshape(values, (values.shape[0], folds, LANES, ADJACENT))
    return tl.sum(tl.sum(apart, 3), 1).to(tl.float64)


@triton.jit
def response_parts(
    new, previous, channels, scale, shift, parts, sums, low, high,
    count, positions, tiles, steps, planes,
    new_image, new_channel, new_position, previous_image, previous_channel, previous_position,
    ACT: tl.constexpr, DIRECT: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr, ADJACENT: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Four sums of a tile of channels of an image over `steps` tiles of positions; DIRECT: over all of them.

    ACT: what is written over the new response, "" for nothing.
    """
    image = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    here = tl.arange(0, POSITIONS)
    # The host knows them to be multiples of UNIT; said so that the compiler may read and write UNIT values at once.
    if LAST:
        count = count // UNIT * UNIT
        new_position, previous_position = new_position // UNIT * UNIT, previous_position // UNIT * UNIT
    else:
        positions = positions // UNIT * UNIT
        new_channel, previous_channel = new_channel // UNIT * UNIT, previous_channel // UNIT * UNIT
    if channels is not None:
        source = tl.load(channels + channel, mask=channel < count, other=0).to(tl.int32)
    else:
        source = channel
    if scale is not None:
        factor = tl.load(scale + channel, mask=channel < count, other=0.0)
        term = tl.load(shift + channel, mask=channel < count, other=0.0)
    now_base = new + image * (new_image // UNIT * UNIT)
    old_base = previous + image * (previous_image // UNIT * UNIT)
    dot = tl.zeros((CHANNELS, LANES), dtype=tl.float64)
    now_square = tl.zeros((CHANNELS, LANES), dtype=tl.float64)
    old_square = tl.zeros((CHANNELS, LANES), dtype=tl.float64)
    gap = tl.zeros((CHANNELS, LANES), dtype=tl.float64)
    for step in range(part * steps, tl.minimum(part * steps + steps, tl.cdiv(positions, POSITIONS))):
        position = step * POSITIONS + here
        inside = (channel < count)[:, None] & (position < positions)[None, :]
        origin = now_base + (source[:, None] * new_channel + position[None, :] * new_position)
        a = tl.load(origin, mask=inside, other=0.0)
        target = old_base + (channel[:, None] * previous_channel + position[None, :] * previous_position)
        b = tl.load(target, mask=inside, other=0.0)
        tl.store(target, a.to(previous.dtype.element_ty), mask=inside)
        if ACT != "":
            y = a.to(tl.float32)
            if scale is not None:
                y = (y * factor[:, None] + term[:, None]).to(new.dtype.element_ty).to(tl.float32)
            y, _ = activated(y, low, high, ACT, new.dtype.element_ty)
            tl.store(origin, y.to(new.dtype.element_ty), mask=inside)
        if previous.dtype.element_ty == tl.float64:
            a = a.to(tl.float64)
        else:
            a, b = a.to(tl.float32), b.to(tl.float32)
        dot += lanes_of(a * b, LANES, ADJACENT)
        now_square += lanes_of(a * a, LANES, ADJACENT)
        old_square += lanes_of(b * b, LANES, ADJACENT)
        gap += lanes_of((a - b) * (a - b), LANES, ADJACENT)
    dots, now, old, gaps = tl.sum(dot, 1), tl.sum(now_square, 1), tl.sum(old_square, 1), tl.sum(gap, 1)
    place = image * count + channel
    valid = channel < count
    if DIRECT:
        tl.store(sums + place, inner_product(dots, now, old, gaps), mask=valid)
        tl.store(sums + planes + place, now, mask=valid)
        tl.store(sums + 2 * planes + place, old, mask=valid)
    else:
        target = parts + part.to(tl.int64) * 4 * planes + place
        tl.store(target, dots, mask=valid)
        tl.store(target + planes, now, mask=valid)
        tl.store(target + 2 * planes, old, mask=valid)
        tl.store(target + 3 * planes, gaps, mask=valid)


@triton.jit
def add_response_parts(parts, sums, count, planes, VALUES: tl.constexpr):
    """sums [3, planes] from the four sums [count, 4, planes] of all parts."""
    place = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    valid = place < planes
    dot = tl.zeros((VALUES,), dtype=tl.float64)
    now = tl.zeros((VALUES,), dtype=tl.float64)
    old = tl.zeros((VALUES,), dtype=tl.float64)
    gap = tl.zeros((VALUES,), dtype=tl.float64)
    for part in range(count):
        source = parts + tl.cast(part, tl.int64) * 4 * planes + place
        dot += tl.load(source, mask=valid, other=0.0)
        now += tl.load(source + planes, mask=valid, other=0.0)
        old += tl.load(source + 2 * planes, mask=valid, other=0.0)
        gap += tl.load(source + 3 * planes, mask=valid, other=0.0)
    tl.store(sums + place, inner_product(dot, now, old, gap), mask=valid)
    tl.store(sums + planes + place, now, mask=valid)
    tl.store(sums + 2 * planes + place, old, mask=valid)


class Walk(NamedTuple):
    """Distances of images, channels and positions of a tensor [N, C, *], in elements; of a single position 0."""

    image: int
    channel: int
    position: int


def walk_of(x: Tensor) -> Walk | None:
    """How to walk through x [N, C, *]; None where positions are not equally far apart, or an image is too large."""
    position = behind = 0
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size == 1:
            continue
        if behind and stride != behind:
            return None
        position, behind = position or stride, stride * size
    reach = (x.shape[1] - 1) * x.stride(1) + (x.shape[2:].numel() - 1) * position
    return Walk(x.stride(0), x.stride(1), position) if reach < 2**31 else None


def unit_of(walks: list[Walk], last: bool, fastest: int, itemsize: int) -> int:
    """How many elements may be read at once: up to 16 bytes.

    Args:
        walks: of the tensors that are read and written together.
        last: channels are the fastest dimension, not positions.
        fastest: size of the fastest dimension.
        itemsize: of the smallest element.
    """
    slower = [
        distance for walk in walks for distance in (walk.image, walk.position if last else walk.channel)
    ]
    return math.gcd(16 // itemsize, fastest, *slower)


def parts_of(steps: int, tiles: int) -> int:
    """Into how many parts the positions are cut: from the shape alone, so that every GPU adds in the same order."""
    wanted = min(ceil_div(PROGRAMS, tiles), ceil_div(steps, STEPS))
    return ceil_div(steps, ceil_div(steps, wanted))


def response(new: Tensor, previous: Tensor, channels: Tensor | None = None) -> Tensor:
    return _response(new, previous, channels, "", {"scale": None, "shift": None, "low": 0.0, "high": 0.0})


def affine_act_response(
    x: Tensor, previous: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float
) -> Tensor:
    if not (fits(scale) and fits(shift)) or (scale is None) is not (shift is None):
        return NotImplemented
    return _response(x, previous, None, act, {"scale": scale, "shift": shift, "low": low, "high": high})


def _response(
    new: Tensor, previous: Tensor, channels: Tensor | None, act: str, following: dict[str, Any]
) -> Tensor:
    if new.dtype not in TYPES or previous.dtype not in (*TYPES, torch.float64) or previous.numel() == 0:
        return NotImplemented
    now, old = walk_of(new), walk_of(previous)
    if now is None or old is None:
        return NotImplemented
    n, k = previous.shape[:2]
    positions, last = new.shape[2:].numel(), now.position != 1
    size = min(new.dtype.itemsize, previous.dtype.itemsize)
    narrow = previous.dtype is not torch.float64
    chosen = config("response", new, last=last, narrow=narrow, positions=positions, channels=k, bytes=size)
    if chosen is None:
        return NotImplemented
    tile = chosen.tile
    unit = unit_of([now, old], last, k if last else positions, size)
    tiles, steps = ceil_div(k, tile["CHANNELS"]), ceil_div(positions, tile["POSITIONS"])
    count = parts_of(steps, n * tiles)
    sums = torch.empty((3, n, k), dtype=torch.float64, device=new.device)
    parts = None
    if count > 1:
        parts = torch.empty((count, 4, n, k), dtype=torch.float64, device=new.device)
    constants = {
        "ACT": act,
        "DIRECT": count == 1,
        "LAST": last,
        "UNIT": unit,
        "ADJACENT": 1 if last else min(unit, tile["POSITIONS"] // tile["LANES"]),
    }
    launch(
        response_parts, (n * tiles, count), chosen, constants,
        new=new, previous=previous, channels=channels, parts=parts, sums=sums if count == 1 else None, **following,
        count=k, positions=positions, tiles=tiles, steps=ceil_div(steps, count), planes=n * k,
        new_image=now.image, new_channel=now.channel, new_position=now.position,
        previous_image=old.image, previous_channel=old.channel, previous_position=old.position,
    )  # fmt: skip
    if count > 1:
        values = 256
        launch(
            add_response_parts, (ceil_div(n * k, values),), Config({"VALUES": values}, 4, 1), {},
            parts=parts, sums=sums, count=count, planes=n * k,
        )  # fmt: skip
    return sums
