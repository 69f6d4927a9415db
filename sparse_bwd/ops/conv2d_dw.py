"""conv2d_dw: weight gradient of the selected channels of any Conv2d.

    axis "out":  dw[k, C_in/g, kh, kw]          x whole; grouped: only the input channels of the touched groups are kept
    axis "in":   dw[C_out, k, kh, kw]           x[:, selected] is kept; grouped: dw[k, C_out/g, kh, kw]

The selected slices of dy (and, in grouped layers, of the kept x) go through PyTorch's own weight gradient, so that the
result is exact and the work k / C of dense. A grouped layer with different numbers of selected channels per group is
brought to equal numbers by repeating a channel, and the repeats are dropped from the result (`pick`). `regroup` asks
for the shape of axis "in" in grouped layers.

Triton's kernels gather as they read: no slice of dy and no second copy of x is made. Where the table of `tuning.py` has
not seen them beat cuDNN (k x k kernels without groups), they leave the call to the gathered slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_bwd.ops.backend import known, native, register
from sparse_bwd.ops.layout import is_channels_last, pixels, take_channels
from sparse_bwd.ops.linear_dw import linear_dw_plain
from sparse_bwd.ops.padding import Geometry, pad


class Plan(NamedTuple):
    """Which slices enter the weight gradient; every index is int64 on the layer's device, None = all in order."""

    keep: Tensor | None  # channels of x that are kept for backward
    spread: Tensor | None  # kept channels, repeated so that all groups have as many
    rows: Tensor | None  # channels of dy, repeated likewise
    pick: Tensor | None  # results that are not repeats
    groups: int  # groups of the small convolution


def _even(index: Tensor, group: Tensor, touched: Tensor) -> tuple[Tensor, Tensor | None]:
    """Positions into `index` with equally many per touched group, and which of them are not repeats (None = all)."""
    counts = torch.stack([(group == g).sum() for g in touched])
    width = int(counts.max())
    starts = counts.cumsum(0) - counts
    offset = torch.arange(width).expand(len(touched), width)
    positions = starts[:, None] + offset.minimum(counts[:, None] - 1)
    real = offset < counts[:, None]
    pick = None if bool(real.all()) else real.flatten().nonzero().flatten()
    return positions.flatten(), pick


def make_plan(index: Tensor | None, axis: str, c_in: int, c_out: int, groups: int) -> Plan:
    """The plan of a selection: `index` is a sorted CPU index (None = all channels), not empty."""
    if index is None:
        return Plan(None, None, None, None, groups)
    if groups == 1:
        return Plan(None, None, index, None, 1) if axis == "out" else Plan(index, None, None, None, 1)
    per_in, per_out = c_in // groups, c_out // groups
    group = index // (per_out if axis == "out" else per_in)
    touched = group.unique()
    positions, pick = _even(index, group, touched)
    if axis == "out":
        keep = (touched[:, None] * per_in + torch.arange(per_in)).flatten() if len(touched) < groups else None
        return Plan(
            keep, None, index if len(positions) == len(index) else index[positions], pick, len(touched)
        )
    rows = (touched[:, None] * per_out + torch.arange(per_out)).flatten() if len(touched) < groups else None
    identity = len(positions) == len(index)
    return Plan(index, None if identity else positions, rows, pick, len(touched))


def groups_of(x: Tensor, dy: Tensor, rows: Tensor | None, size: Sequence[int], regroup: bool) -> int:
    """Groups of the small convolution, from the kept input and the shape of dw: those that a channel is selected in.

    Not from the plan, since torch.compile would take the number there as a constant.
    """
    channels = x.shape[1] if not regroup else dy.shape[1] if rows is None else rows.shape[0]
    return channels // size[1]


def kept_input(x: Tensor, keep: Tensor | None) -> Tensor:
    """What backward needs of the input [N, C_in, H, W]: x itself, or a new tensor of the channels `keep`."""
    return x if keep is None else take_channels(x, keep)


def conv2d_dw_plain(
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
    if geometry.is_product(size, x, dy) or geometry.is_strided_product(size, x, dy):
        read = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
        product = linear_dw_plain(pixels(read), pixels(dy), rows, False)[0]
        return (product.t() if regroup else product)[:, :, None, None]
    x = x if spread is None else take_channels(x, spread)
    dy = dy if rows is None else take_channels(dy, rows)
    per_group = x.shape[1] // groups
    like = x.new_empty(dy.shape[1], per_group, size[2], size[3])
    if dy.numel() == 0 or x.numel() == 0:
        return x.new_zeros(tuple(size)).to(memory_format=memory_format_of(x))
    padded = pad(x, geometry)
    if x.is_cpu and x.dtype is torch.bfloat16 and padded.shape[3] < geometry.stride[1]:
        # torch 2.14 reads past the rows of a bfloat16 image narrower than the stride; such images are tiny.
        padded, dy, like = padded.float(), dy.float(), like.float()
    dw: Tensor = torch.ops.aten.convolution_backward(
        dy, padded, like, None, geometry.stride, geometry.inner_padding, geometry.dilation,
        False, [0, 0], groups, [False, True, False],
    )[1]  # fmt: skip
    return arranged(dw.to(x.dtype), pick, groups, regroup, memory_format_of(x))


def arranged(
    dw: Tensor, pick: Tensor | None, groups: int, regroup: bool, layout: torch.memory_format
) -> Tensor:
    """dw of the small convolution in the shape of the compact weight, and without what was repeated."""
    if regroup:
        dw = dw.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    dw = dw if pick is None else dw.index_select(0, pick)
    return dw.to(memory_format=layout)


def conv2d_dw_native(
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
    depthwise = groups > 1 and x.shape[1] == groups
    if not depthwise or spread is not None or regroup or not known(x):
        return NotImplemented
    selected = dy.shape[1] if rows is None else rows.numel()
    # The CUDA kernel knows one filter per channel only.
    if x.is_cuda and selected != groups:  # pragma: no cover -- needs CUDA
        return NotImplemented
    geometry = Geometry(tuple(stride), tuple(padding), padding_mode, tuple(dilation), groups)  # type: ignore[arg-type]
    layout = memory_format_of(x)
    x = pad(x, geometry)
    if not (x.is_contiguous(memory_format=layout) and dy.is_contiguous(memory_format=layout)):
        return NotImplemented
    dw = torch.empty(
        (selected, x.shape[1] // groups, *size[2:]), dtype=x.dtype, device=x.device, memory_format=layout
    )
    last = layout is torch.channels_last
    native("conv2d_dw")(dw, x, dy, rows, stride, geometry.inner_padding, dilation, groups, last)
    return dw if pick is None else dw.index_select(0, pick)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format of dw: that of x, in which PyTorch's convolution computes it."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _fake(x, dy, spread, rows, pick, size, stride, padding, padding_mode, dilation, groups, regroup):  # type: ignore[no-untyped-def]
    return torch.empty(tuple(size), dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


conv2d_dw = register(
    "conv2d_dw(Tensor x, Tensor dy, Tensor? spread, Tensor? rows, Tensor? pick, SymInt[] size, int[] stride, "
    "int[] padding, str padding_mode, int[] dilation, SymInt groups, bool regroup) -> Tensor",
    conv2d_dw_plain,
    _fake,
    conv2d_dw_native,
    triton="conv2d_dw",
)
