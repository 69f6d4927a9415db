"""Calls of the operators on the shapes of real networks.

Benchmarks time these calls, `sparse-bwd tune` chooses tiles by them, and the proof without a GPU compiles what they
would launch. The least that each call must move and compute is in `work.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.measure.networks import Conv, Layer, Linear, Pool
from sparse_bwd.measure.selections import evenly_spread
from sparse_bwd.measure.work import (
    Work,
    affine_dx_work,
    affine_work,
    conv_work,
    linear_work,
    norm_affine_work,
    pool_work,
    response_work,
    sketch_work,
    write_back_work,
)  # fmt: skip
from sparse_bwd.ops.bits import packed_size
from sparse_bwd.ops.conv2d_dw import make_plan

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_STORED = {**DTYPES, "fp64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SKETCH = 16  # numbers per channel of a response sketch


@dataclass(frozen=True)
class Call:
    """A call of an operator; `arguments` makes new ones on a device (random; on "meta" without values)."""

    operator: str
    shape: str
    dtype: str
    layout: str
    work: Work
    arguments: Callable[[str], tuple[Any, ...]]

    def __str__(self) -> str:
        return f"{self.operator} {self.shape}, {self.dtype}, {self.layout}"


@dataclass(frozen=True)
class Setting:
    """Images in a batch, dtype (a key of DTYPES, or fp64 where a response is stored) and layout (of LAYOUTS)."""

    batch: int = 128
    dtype: str = "fp32"
    layout: str = "channels_last"

    @property
    def itemsize(self) -> int:
        return _STORED[self.dtype].itemsize

    def values(self, device: str, *shape: int) -> Tensor:
        """Normal values; images in the layout."""
        drawn = torch.randn(shape, device=device, dtype=_STORED[self.dtype])
        return drawn.to(memory_format=LAYOUTS[self.layout]) if len(shape) == 4 else drawn


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Inside, float32 products may use TF32 where the dtype is "tf32", and are exact otherwise.

    By the older flags: torch.compile reads them, and PyTorch raises where the newer ones say something else.
    """
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        yield
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def chosen(channels: int, share: float) -> list[int] | None:
    """A share of the channels, evenly spread; None = all."""
    return None if share >= 1 else evenly_spread(channels, share)


def _index(channels: Sequence[int] | Tensor | None, device: str) -> Tensor | None:
    return None if channels is None else torch.as_tensor(channels, device=device)


def linear_dw(layer: Linear, share: float, setting: Setting, axis: str = "out") -> Call:
    """The weight gradient of a Linear; on axis "in" x holds the selected channels only."""
    m = setting.batch * layer.tokens
    c_in = layer.c_in if axis == "out" else len(evenly_spread(layer.c_in, share))
    rows = chosen(layer.c_out, share) if axis == "out" else None
    k = layer.c_out if rows is None else len(rows)

    def arguments(device: str) -> tuple[Any, ...]:
        x, dy = (setting.values(device, m, features) for features in (c_in, layer.c_out))
        return x, dy, _index(rows, device), True

    work = linear_work(m, c_in, k, setting.itemsize, rows is not None)
    return Call("linear_dw", f"{layer}, {axis} {share:.3g}", setting.dtype, "", work, arguments)


def linear_dw_statistics(layer: Linear, share: float, setting: Setting) -> Call:
    """The same on axis "out" with the three statistics of each row."""
    plain = linear_dw(layer, share, setting)
    k = len(evenly_spread(layer.c_out, share))
    work = linear_work(setting.batch * layer.tokens, layer.c_in, k, setting.itemsize, share < 1, True)

    def arguments(device: str) -> tuple[Any, ...]:
        previous, weight = (setting.values(device, k, layer.c_in) for _ in range(2))
        return *plain.arguments(device), previous, weight

    return Call("linear_dw_statistics", plain.shape, setting.dtype, "", work, arguments)


def conv2d_dw(layer: Conv, share: float, setting: Setting, axis: str = "out") -> Call:
    """The weight gradient of a convolution with the plan that the layer would make."""
    c_in, c_out, kernel, groups = layer.c_in, layer.c_out, layer.kernel, layer.groups
    channels = chosen(c_out if axis == "out" else c_in, share)
    plan = make_plan(None if channels is None else torch.tensor(channels), axis, c_in, c_out, groups)
    kept = c_in if plan.keep is None else len(plan.keep)
    regroup = axis == "in" and groups > 1
    if regroup:
        size = (kept, c_out // groups, kernel, kernel)
    else:
        rows = c_out if axis == "in" or channels is None else len(channels)
        size = (rows, kept // plan.groups, kernel, kernel)

    def arguments(device: str) -> tuple[Any, ...]:
        x = setting.values(device, setting.batch, kept, layer.size, layer.size)
        dy = setting.values(device, setting.batch, c_out, layer.size_out, layer.size_out)
        indices = (_index(each, device) for each in (plan.spread, plan.rows, plan.pick))
        stride, padding = [layer.stride] * 2, [layer.padding] * 4
        return x, dy, *indices, size, stride, padding, "zeros", [1, 1], plan.groups, regroup

    k = c_out if plan.rows is None else len(plan.rows)
    work = conv_work(layer, setting.batch, kept, k, math.prod(size), setting.itemsize, plan.rows is not None)
    return Call("conv2d_dw", f"{layer}, {axis} {share:.3g}", setting.dtype, setting.layout, work, arguments)


def _vectors(channels: int, device: str) -> tuple[Tensor, Tensor]:
    scale, shift = torch.rand((2, channels), device=device)
    return scale, shift


def affine_act(
    channels: int,
    size: int,
    act: str,
    setting: Setting,
    norm: bool = True,
    flags: bool = True,
    inplace: bool = False,
) -> Call:
    """Norm on running statistics and activation, or the activation alone; with the flags that backward needs."""
    elements = setting.batch * channels * size**2
    limits = {"hardtanh": (0.0, 6.0), "leaky_relu": (0.1, 0.0)}.get(act, (0.0, 0.0))

    def arguments(device: str) -> tuple[Any, ...]:
        x = setting.values(device, setting.batch, channels, size, size)
        return x, *(_vectors(channels, device) if norm else (None, None)), act, *limits, flags

    work = affine_work(elements, channels * norm, setting.itemsize, flags and act != "none")
    name = "affine_act_" if inplace else "affine_act"
    return Call(name, _about(act, channels, size, norm), setting.dtype, setting.layout, work, arguments)


def affine_act_dx(
    channels: int, size: int, act: str, setting: Setting, norm: bool = True, shift: bool = False
) -> Call:
    """Backward of the same, on request with the gradient of the shift."""
    elements = setting.batch * channels * size**2
    flags = act != "none"

    def arguments(device: str) -> tuple[Any, ...]:
        dy = setting.values(device, setting.batch, channels, size, size)
        scale = _vectors(channels, device)[0] if norm else None
        mask = None
        if flags:
            mask = torch.randint(0, 256, (packed_size(elements),), dtype=torch.uint8, device=device)
        return dy, scale, mask, act, 0.1 if act == "leaky_relu" else 0.0, list(dy.stride()), shift

    work = affine_dx_work(elements, channels * norm, setting.itemsize, flags, shift)
    about = _about(act, channels, size, norm) + (", shift trained" if shift else "")
    return Call("affine_act_dx", about, setting.dtype, setting.layout, work, arguments)


def _about(act: str, channels: int, size: int, norm: bool) -> str:
    return f"{'norm, ' if norm else ''}{act}, {channels} channels, {size}^2"


def norm_affine(channels: int) -> Call:
    """Norm on running statistics as a scale and a shift per channel."""

    def arguments(device: str) -> tuple[Any, ...]:
        return *torch.rand((4, channels), device=device), 1e-5

    return Call("norm_affine", f"{channels} channels", "fp32", "", norm_affine_work(channels), arguments)


def max_pool2d(layer: Pool, setting: Setting) -> tuple[Call, Call]:
    """Pooling forward and backward; the offsets are the middle of the window, always inside."""
    window: tuple[Any, ...] = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    shape = (setting.batch, layer.channels, layer.size, layer.size)
    shape_out = (*shape[:2], layer.size_out, layer.size_out)

    def forward(device: str) -> tuple[Any, ...]:
        return setting.values(device, *shape), *window

    def backward(device: str) -> tuple[Any, ...]:
        offset = torch.full(shape_out, 4, dtype=torch.uint8, device=device)
        offset = offset.to(memory_format=LAYOUTS[setting.layout])
        return setting.values(device, *shape_out), offset, shape, *window

    works = pool_work(layer, setting.batch, setting.itemsize)
    about = (str(layer), setting.dtype, setting.layout)
    return Call("max_pool2d", *about, works[0], forward), Call("max_pool2d_dx", *about, works[1], backward)


def response(
    channels: int, size: int, setting: Setting, stored: str | None = None, share: float = 1.0
) -> Call:
    """Similarity of the responses of a share of the channels, the stored ones in the dtype `stored` (None: as new)."""
    other, rows = replace(setting, dtype=stored or setting.dtype), chosen(channels, share)
    k = channels if rows is None else len(rows)

    def arguments(device: str) -> tuple[Any, ...]:
        new = setting.values(device, setting.batch, channels, size, size)
        return new, other.values(device, setting.batch, k, size, size), _index(rows, device)

    work = response_work(setting.batch, k, size**2, setting.itemsize, other.itemsize, rows is not None)
    shape = f"{k} of {channels} channels, {size}^2, stored in {other.dtype}"
    return Call("response", shape, setting.dtype, setting.layout, work, arguments)


def affine_act_response(
    channels: int, size: int, act: str, setting: Setting, stored: str | None = None, norm: bool = True
) -> Call:
    """The same of all channels, with the norm and the activation behind the response in place."""
    plain = response(channels, size, setting, stored)
    activation = affine_act(channels, size, act, setting, norm, flags=False, inplace=True)

    def arguments(device: str) -> tuple[Any, ...]:
        x, previous, _ = plain.arguments(device)
        return x, previous, *activation.arguments(device)[1:6]

    read = setting.batch * channels * size**2 * setting.itemsize  # by both, and once by the two together
    moved, operations = (a + b for a, b in zip(plain.work, activation.work, strict=True))
    return replace(
        plain,
        operator="affine_act_response",
        shape=f"{activation.shape}, stored in {stored or setting.dtype}",
        work=Work(moved - read, operations),
        arguments=arguments,
    )


def response_sketch(channels: int, size: int, setting: Setting) -> Call:
    """The sketch of responses, the first of a measurement."""

    def arguments(device: str) -> tuple[Any, ...]:
        sums = torch.zeros(channels, SKETCH, dtype=torch.float64, device=device)
        return setting.values(device, setting.batch, channels, size, size), sums, 1234, 0

    work = sketch_work(setting.batch, channels, size**2, setting.itemsize, SKETCH)
    shape = f"{channels} channels, {size}^2"
    return Call("response_sketch", shape, setting.dtype, setting.layout, work, arguments)


def write_back(layers: Iterable[Layer], share: float, setting: Setting, name: str, axis: str = "out") -> Call:
    """The trained slices of all layers of a network."""
    shapes = [_weight_shape(layer) for layer in layers if not isinstance(layer, Pool)]
    dims = [0 if axis == "out" or shape[1] == 1 else 1 for shape in shapes]
    rows = [evenly_spread(shape[dim], share) for shape, dim in zip(shapes, dims, strict=True)]
    parts = [(*s[:d], len(r), *s[d + 1 :]) for s, d, r in zip(shapes, dims, rows, strict=True)]

    def arguments(device: str) -> tuple[Any, ...]:
        weights, slices = ([setting.values(device, *shape) for shape in each] for each in (shapes, parts))
        indices = [None if share >= 1 else _index(row, device) for row in rows]
        return weights, slices, indices, dims, [1] * len(dims)

    selected = 0 if share >= 1 else sum(map(len, rows))
    work = write_back_work(sum(map(math.prod, parts)), selected, setting.itemsize)
    return Call("write_back", f"{name}, {axis} {share:.3g}", setting.dtype, setting.layout, work, arguments)


def _weight_shape(layer: Conv | Linear) -> tuple[int, ...]:
    if isinstance(layer, Linear):
        return layer.c_out, layer.c_in
    return layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel
