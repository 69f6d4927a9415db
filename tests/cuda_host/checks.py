"""What every build of the CUDA kernels must do, on whatever device. A check takes `ops`, which has the native schemas.

Inputs are small multiples of 1/8, so that every product and every sum is exact in float32: an implementation must
give the oracle's values, rounded once to the element type, and needs no tolerance whatever the order of its sums.
Every tensor that a kernel gets lies between fences, whose bits may not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.ops import bits
from sparse_bwd.ops.padding import Geometry
from sparse_bwd.ops.reference import (
    affine_act_bwd_ref,
    affine_act_ref,
    conv2d_bwd_ref,
    max_pool2d_bwd_ref,
    max_pool2d_ref,
    response_ref,
)

from ..tolerance import assert_same_bits

FENCE = 64  # elements before and behind a tensor; a multiple of 16 bytes for every dtype
LAYOUTS = ("contiguous", "channels_last")
ACTS = {"none": 0, "relu": 1, "hardtanh": 2, "leaky_relu": 3}


@contextmanager
def poisoned_workspaces() -> Iterator[None]:
    """Inside, memory that a binding asks for is full of NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Fenced:
    """Tensors on a device between elements that must not change; `shift` moves them off their 16-byte alignment."""

    def __init__(self, device: str, shift: int = 0) -> None:
        self.device, self.shift = device, shift
        self.buffers: list[tuple[Tensor, int, int]] = []

    def __call__(self, values: Tensor) -> Tensor:
        """A copy of a dense tensor, with the same strides."""
        size, start = values.numel(), FENCE + self.shift
        byte = torch.full(((size + 2 * FENCE + self.shift) * values.itemsize,), 0xA5, dtype=torch.uint8)
        buffer = byte.to(self.device).view(values.dtype)
        self.buffers.append((buffer, start, start + size))
        return buffer.as_strided(values.shape, values.stride(), start).copy_(values)

    def empty(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a result with the shape and strides of `values`, full of NaN or of ones."""
        dtype = dtype or values.dtype
        fill = float("nan") if dtype.is_floating_point else 255
        return self(torch.full_like(values, fill, dtype=dtype, memory_format=torch.preserve_format))

    def check(self) -> None:
        """Fail if any kernel wrote outside of its tensors."""
        for buffer, start, stop in self.buffers:
            raw, width = buffer.view(torch.uint8), buffer.itemsize
            outside = torch.cat([raw[: start * width], raw[stop * width :]])
            assert bool((outside == 0xA5).all()), "a kernel wrote outside of its tensor"


def eighths(*shape: int, most: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/8 up to most / 8 in magnitude, exact in every dtype."""
    return (torch.randint(-most, most + 1, shape) / 8).to(dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values [N, C, ...] with the channels second or, in channels_last, last in memory."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else values


def _with_specials(values: Tensor) -> Tensor:
    """Some elements replaced by NaN and the infinities."""
    for special in (float("nan"), float("inf"), float("-inf")):
        values = torch.where(torch.rand(values.shape) < 0.05, special, values)
    return values


def _flags(mask: Tensor, like: Tensor) -> Tensor:
    """The packed flags as a bool tensor of the shape and strides of `like`; the bits past the end must be 0."""
    everything = bits.unpack(mask.cpu(), mask.numel() * 8)
    assert not everything[like.numel() :].any(), "bits past the last element are set"
    return everything[: like.numel()].as_strided(like.shape, like.stride())


def check_affine_act(
    ops: Any, device: str, shape: Sequence[int], dtype: torch.dtype, layout: str, act: str,
    affine: bool = True, shift: int = 0, inplace: bool = False,
) -> None:  # fmt: skip
    """Values, flags, dx and dshift, with NaN, infinities and an infinite scale among the inputs."""
    low, high = {"hardtanh": (-1.0, 1.5), "leaky_relu": (0.125, 0.0)}.get(act, (0.0, 0.0))
    x = laid_out(_with_specials(eighths(*shape)).to(dtype), layout)
    dy = laid_out(_with_specials(eighths(*shape)).to(dtype), layout)
    channels = shape[1]
    inner = 1 if layout == "channels_last" else x.numel() // max(shape[0] * channels, 1)
    scale, bias = (eighths(channels, most=8), eighths(channels, most=8)) if affine else (None, None)
    fenced = Fenced(device, shift)
    a, b = (None if v is None else fenced(v) for v in (scale, bias))
    source = fenced(x)
    y = source if inplace else fenced.empty(x)
    packed = torch.zeros(bits.packed_size(x.numel()), dtype=torch.uint8)
    mask = None if act == "none" else fenced.empty(packed)
    ops.affine_act(y, mask, source, a, b, inner, ACTS[act], low, high)
    wide = [None if v is None else v.double() for v in (scale, bias)]
    pre = affine_act_ref(x.double(), *wide, "none").to(dtype)
    assert_same_bits(y.cpu(), affine_act_ref(pre, None, None, act, low, high), "y")
    marks = {"relu": pre <= 0, "hardtanh": (pre <= low) | (pre >= high), "leaky_relu": pre > 0}.get(act)
    if mask is not None and marks is not None:
        assert torch.equal(_flags(mask, x), marks), "flags differ"

    if scale is not None and act in ("relu", "hardtanh"):
        scale[0] = float("inf")
        a = fenced(scale)
    g = affine_act_bwd_ref(pre.double(), None, None, dy.double(), act, low, high)[0]
    # A NaN passes its gradient, as on CUDA; PyTorch's hardtanh on CPU stops it in its vectorised loop alone.
    g = dy.double().where(pre.isnan(), g) if act == "hardtanh" else g
    dx = g if scale is None else g * scale.double().view(1, -1, *([1] * (x.dim() - 2)))
    if marks is not None and act != "leaky_relu":
        dx = dx.masked_fill(marks, 0.0)
    for wants_shift in (False, True):
        out = fenced.empty(x)
        dshift = fenced.empty(torch.zeros(channels)) if wants_shift else None
        ops.affine_act_dx(out, dshift, fenced(dy), a, mask, channels, inner, ACTS[act], low)
        assert_same_bits(out.cpu(), dx.to(dtype), "dx")
        if dshift is not None:
            others = [d for d in range(x.dim()) if d != 1]
            assert_same_bits(dshift.cpu(), g.sum(others).float(), "dshift")
    fenced.check()


def check_conv2d_dw(
    ops: Any, device: str, shape: Sequence[int], selected: int, kernel: Sequence[int], geometry: Geometry,
    dtype: torch.dtype, layout: str, shift: int = 0,
) -> None:  # fmt: skip
    """dw of `selected` channels of a depthwise convolution over x of `shape`; None selected = all, no index."""
    channels = shape[1]
    x = eighths(*shape, most=4)
    weight = torch.zeros(channels, 1, *kernel)
    sizes = [
        (shape[2 + i] + 2 * geometry.inner_padding[i] - geometry.dilation[i] * (kernel[i] - 1) - 1)
        // geometry.stride[i] + 1
        for i in (0, 1)
    ]  # fmt: skip
    dy = eighths(shape[0], channels, *sizes, most=4)
    index = torch.randperm(channels)[:selected].sort().values if selected else None
    kept = x if index is None else x[:, index]
    dw = weight.double()
    if x.numel():
        dw = conv2d_bwd_ref(x.double(), dw, dy.double(), geometry._replace(groups=channels))[1]
    expected = (dw if index is None else dw[index]).to(dtype)
    fenced = Fenced(device, shift)
    out = fenced.empty(laid_out(expected, layout))
    ops.conv2d_dw(
        out, fenced(laid_out(kept.to(dtype), layout)), fenced(laid_out(dy.to(dtype), layout)),
        None if index is None else index.to(device), list(geometry.stride), list(geometry.inner_padding),
        list(geometry.dilation), kept.shape[1], layout == "channels_last",
    )  # fmt: skip
    assert_same_bits(out.cpu(), expected, "dw")
    fenced.check()


def check_max_pool2d(
    ops: Any, device: str, shape: Sequence[int], kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil: bool, dtype: torch.dtype, layout: str, shift: int = 0,
) -> None:  # fmt: skip
    """Maxima and offsets among many ties, NaN and infinities; dx where windows overlap."""
    x = laid_out(_with_specials(eighths(*shape, most=3)).to(dtype), layout)
    last, window = layout == "channels_last", (kernel, stride, padding, dilation)
    expected, where = max_pool2d_ref(x.float(), *window, ceil)
    fenced = Fenced(device, shift)
    like = laid_out(expected.to(dtype), layout)
    y, offset = fenced.empty(like), fenced.empty(like, torch.uint8)
    ops.max_pool2d(y, offset, fenced(x), *window, last)
    assert_same_bits(y.cpu(), expected.to(dtype), "y")
    assert torch.equal(offset.cpu().long(), where), "offsets differ"
    dy = laid_out(eighths(*like.shape).to(dtype), layout)
    dx = fenced.empty(x)
    ops.max_pool2d_dx(dx, fenced(dy), offset, *window, last)
    expected_dx = max_pool2d_bwd_ref(x.double(), dy.double(), *window, ceil).to(dtype)
    assert_same_bits(dx.cpu(), expected_dx, "dx")
    fenced.check()


def check_response(
    ops: Any,
    device: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    stored: torch.dtype,
    shift: int,
    layout: str,
) -> None:
    """The three sums, exact in float64, and the new response stored in the dtype of the previous one."""
    new, previous = (laid_out(eighths(*shape).to(t), layout) for t in (dtype, stored))
    fenced = Fenced(device, shift)
    sums = fenced.empty(torch.zeros(3, *shape[:2], dtype=torch.float64))
    memory = fenced(previous)
    ops.response(sums, memory, fenced(new), layout == "channels_last")
    assert_same_bits(sums.cpu(), torch.stack(response_ref(new, previous)), "sums")
    assert_same_bits(memory.cpu(), new.to(stored), "stored response")
    fenced.check()
