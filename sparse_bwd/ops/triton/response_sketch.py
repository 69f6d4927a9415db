"""response_sketch in Triton: the responses are read once, for their signed sums and for their norms.

    z[n, c, b] = sum of sign(j) x[n, c, i] over the positions i with i mod r = b,   j = first[n] + i
    sums[c, (first[n] + b) mod r] += z[n, c, b] / |x[n, c]|        first[n] = start + n (P + 1)
    sums[c, (first[n] + P) mod r] += sign(first[n] + P)            where x[n, c] is zero

A sample is divided by its norm when its sums are complete, so that no second reading is needed; and its sums start at
number 0 in any sample, so that rows of r values begin where memory is aligned. A program takes a tile of channels of
one image over a part of the positions, at most STEPS tiles of them, in float32; a second kernel adds and divides in
float64, samples and parts in order. A sign costs about twenty integer operations, and serves all channels that a thread
holds of a position.

The error of z / |x| is at most 2 STEPS 2^-24 sqrt(P / r), where |z| / |x| itself is about sqrt(1 / r). Values must lie
between 1e-18 and 1e18 in magnitude, or be zero: smaller ones count as zero, larger ones make the sketch NaN.

Moves   e N C P + 16 parts N C (r + 1) bytes        adds   2 N C P
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.triton.launch import TYPES, ceil_div, config, launch
from sparse_bwd.ops.triton.response import PROGRAMS, unit_of, walk_of
from sparse_bwd.ops.tuning import Config

STEPS = 32  # of a part, at most
MOST = 1024  # numbers of a channel
WORD = 0xFFFFFFFF


@triton.jit
def mixed(x):
    """The permutation of 32-bit words that `ops/sketch.py` calls _mix; x is uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def signs(key, place):
    """+1 or -1 at places in int64; key: the hash of the seed, in uint32."""
    hashed = mixed(mixed(key ^ (place >> 32).to(tl.uint32)) ^ place.to(tl.uint32))
    return 1.0 - 2.0 * (hashed & 1).to(tl.float32)


@triton.jit
def signs_near(key, first, index):
    """`signs` of first + index for int32 index, whose upper words are one of two: less work for each."""
    place = first.to(tl.uint32) + index.to(tl.uint32)
    upper = (first >> 32).to(tl.uint32)
    here, beyond = mixed(key ^ upper), mixed(key ^ (upper + 1))
    hashed = mixed(tl.where(place < first.to(tl.uint32), beyond, here) ^ place)
    return 1.0 - 2.0 * (hashed & 1).to(tl.float32)


@triton.jit
def sketch_parts(
    new, parts, squares,
    key, start, channels, positions, tiles, steps, planes, new_image, new_channel, new_position,
    NUMBERS: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """z and |x|^2 of a tile of channels of an image over `steps` times ROWS times NUMBERS positions."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    first = sample * (positions + 1) + start
    seeded = tl.zeros((1,), dtype=tl.uint32) + tl.cast(key, tl.uint32)
    # The host knows them to be multiples of UNIT; said so that the compiler may read UNIT values at once.
    if LAST:
        channels = channels // UNIT * UNIT
        new_position = new_position // UNIT * UNIT
    else:
        positions = positions // UNIT * UNIT
        new_channel = new_channel // UNIT * UNIT
    channel = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)[None, :, None]
    number = tl.arange(0, WIDTH)
    base = new + sample * (new_image // UNIT * UNIT) + (channel * new_channel)[:, None, None]
    known = (channel < channels)[:, None, None] & (number < NUMBERS)[None, None, :]
    z = tl.zeros((CHANNELS, ROWS, WIDTH), dtype=tl.float32)
    square = tl.zeros((CHANNELS, ROWS, WIDTH), dtype=tl.float32)
    for step in range(part * steps, part * steps + steps):
        index = (step * ROWS + row) * NUMBERS + number[None, None, :]
        x = tl.load(base + index * new_position, mask=known & (index < positions), other=0.0).to(tl.float32)
        z += x * signs_near(seeded[:, None, None], first, index)
        square += x * x
    place = part.to(tl.int64) * planes + sample * channels + channel
    tl.store(
        parts + place[:, None] * NUMBERS + number[None, :],
        tl.sum(z.to(tl.float64), 1),
        mask=(channel < channels)[:, None] & (number < NUMBERS)[None, :],
    )
    tl.store(squares + place, tl.sum(tl.sum(square.to(tl.float64), 2), 1), mask=channel < channels)


@triton.jit
def add_sketches(
    parts, squares, sums, key, start, samples, channels, positions, count, sums_channel, sums_number,
    NUMBERS: tl.constexpr, WIDTH: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """The sketch of one channel, from all parts of all samples, SAMPLES of them at a time."""
    channel = tl.program_id(0)
    seeded = tl.zeros((1,), dtype=tl.uint32) + tl.cast(key, tl.uint32)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for begin in range(0, samples, SAMPLES):
        sample = (begin + tl.arange(0, SAMPLES)).to(tl.int64)
        first = sample * (positions + 1) + start
        number = (column[None, :] + (NUMBERS - first % NUMBERS)[:, None]) % NUMBERS
        valid = sample < samples
        inside = valid[:, None] & (column < NUMBERS)[None, :]
        z = tl.zeros((SAMPLES, WIDTH), dtype=tl.float64)
        square = tl.zeros((SAMPLES,), dtype=tl.float64)
        for part in range(count):
            place = (tl.cast(part, tl.int64) * samples + sample) * channels + channel
            z += tl.load(parts + place[:, None] * NUMBERS + number, mask=inside, other=0.0)
            square += tl.load(squares + place, mask=valid, other=0.0)
        zero = square == 0.0
        norm = tl.sqrt(tl.where(zero, 1.0, square)) + (square - square)  # an infinite one becomes NaN
        z = z / norm[:, None]
        last = first + positions
        flag = (valid & zero)[:, None] & (column[None, :] == (last % NUMBERS)[:, None])
        z += tl.where(flag, signs(seeded, last).to(tl.float64)[:, None], 0.0)
        total += tl.sum(z, 0)
    target = sums + channel.to(tl.int64) * sums_channel + column * sums_number
    inside = column < NUMBERS
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


def key_of(seed: int) -> int:
    """The hash of both words of a seed, as a signed 32-bit number."""
    key = 0
    for word in (seed & WORD, seed >> 32 & WORD):
        key ^= word
        key = (key ^ key >> 16) * 0x7FEB352D & WORD
        key = (key ^ key >> 15) * 0x846CA68B & WORD
        key ^= key >> 16
    return key - 2**32 if key >= 2**31 else key


def response_sketch(new: Tensor, sums: Tensor, seed: int, start: int) -> None:
    walk = walk_of(new) if new.dtype in TYPES and sums.dtype is torch.float64 and new.numel() else None
    if walk is None or sums.shape[1] > MOST:
        return NotImplemented
    (n, c), numbers, positions = new.shape[:2], sums.shape[1], new.shape[2:].numel()
    last, bytes = walk.position != 1, new.dtype.itemsize
    chosen = config("response_sketch", new, last=last, positions=positions, channels=c, bytes=bytes)
    if chosen is None:
        return NotImplemented
    chosen, width = _fitted(chosen, numbers)
    tiles = ceil_div(c, chosen.tile["CHANNELS"])
    whole = ceil_div(positions, chosen.tile["ROWS"] * numbers)
    steps = min(STEPS, ceil_div(whole, ceil_div(PROGRAMS, n * tiles)))
    count = ceil_div(whole, steps)
    parts = torch.empty((count, n, c, numbers), dtype=torch.float64, device=new.device)
    squares = torch.empty((count, n, c), dtype=torch.float64, device=new.device)
    constants = {"NUMBERS": numbers, "WIDTH": width}
    unit = unit_of([walk], last, c if last else positions, bytes)
    shared = {"parts": parts, "squares": squares, "key": key_of(seed), "start": start, "positions": positions}
    launch(
        sketch_parts, (n * tiles, count), chosen, {**constants, "LAST": last, "UNIT": unit}, **shared,
        new=new, channels=c, tiles=tiles, steps=steps, planes=n * c,
        new_image=walk.image, new_channel=walk.channel, new_position=walk.position,
    )  # fmt: skip
    samples = max(1, min(16, 512 // width))
    launch(
        add_sketches, (c,), Config({"SAMPLES": samples}, max(4, width // 128), 1), constants, **shared,
        sums=sums, samples=n, channels=c, count=count, sums_channel=sums.stride(0), sums_number=sums.stride(1),
    )  # fmt: skip
    return None


def _fitted(chosen: Config, numbers: int) -> tuple[Config, int]:
    """The tile for r numbers and the width of its rows: POSITIONS in rows of r, fewer channels where those are wide."""
    width = triton.next_power_of_2(numbers)
    channels, positions = chosen.tile["CHANNELS"], chosen.tile["POSITIONS"]
    fewer = max(1, channels * positions // (2 * width))
    return chosen._replace(tile={"CHANNELS": min(channels, fewer), "ROWS": max(1, positions // width)}), width
