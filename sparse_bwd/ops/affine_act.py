"""affine_act: frozen batch norm and activation in one pass, with one bit per element for backward.

    y  = act(a[c] x + b[c])        a, b absent: y = act(x)
    dx = a[c] act'(.) dy           db[c] = sum over n, h, w of act'(.) dy

Kept for backward: ceil(Y / 8) bytes of flags in storage order of y, and a. Neither x nor y is needed.
A flag is set where relu and hardtanh let no gradient through, and where leaky_relu has slope 1; a NaN passes its
gradient as in PyTorch. Plain PyTorch runs over blocks of about 2**18 elements, so that the flags as bytes (one per
element) never exist for a whole tensor and each block stays in cache between the steps; native code and Triton read
each element once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_bwd.ops import bits
from sparse_bwd.ops.backend import known, native, register
from sparse_bwd.ops.layout import dense_strides, flat, is_channels_last, is_dense

BLOCK = 1 << 18
CODES = {"none": 0, "relu": 1, "hardtanh": 2, "leaky_relu": 3}  # as csrc/schemas.cpp numbers them
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _blocks(y: Tensor, scale: Tensor | None) -> Iterator[tuple[slice, slice | None]]:
    """Blocks of the flat view of y as (elements, per-channel rows or None), each starting at a multiple of 8.

    In NCHW a block holds whole planes of one or more channels; in channels_last whole pixels.
    """
    if scale is None:
        step, unit = BLOCK, 1
    else:
        unit = y.shape[1] if is_channels_last(y) else y.numel() // max(y.shape[0] * y.shape[1], 1)
        step = max(BLOCK // max(unit, 1) // 8, 1) * 8 * max(unit, 1)
    for start in range(0, y.numel(), step):
        stop = min(start + step, y.numel())
        yield slice(start, stop), slice(start // unit, stop // unit) if scale is not None else None


class _PerChannel:
    """A per-channel vector, shaped so that it broadcasts over the 2-d view of a block."""

    def __init__(self, vector: Tensor, like: Tensor) -> None:
        self.by_pixel = is_channels_last(like)
        self.width = like.shape[1] if self.by_pixel else like.numel() // max(like.shape[0] * like.shape[1], 1)
        self.vector = vector if self.by_pixel else vector.repeat(like.shape[0])[:, None]

    def rows(self, which: slice) -> Tensor:
        return self.vector if self.by_pixel else self.vector[which]


def _in_planes(x: Tensor) -> bool:
    return x.is_contiguous() or is_channels_last(x)


def _broadcast(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *([1] * (like.dim() - 2)))


def _activate_(y: Tensor, act: str, low: float, high: float, flags: bool) -> Tensor | None:
    """Apply the activation to y in place; the flags as a bool tensor of y's shape if asked for."""
    marks = None
    if act == "relu":
        marks = y.le(0) if flags else None
        torch.relu_(y)
    elif act == "hardtanh":
        marks = y.le(low).logical_or_(y.ge(high)) if flags else None
        torch.ops.aten.hardtanh_(y, low, high)
    elif act == "leaky_relu":
        marks = y.gt(0) if flags else None
        torch.ops.aten.leaky_relu_(y, low)
    return marks


def _run(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    low: float,
    high: float,
    keep: bool,
) -> Tensor:
    """Write act(scale x + shift) into y (which may be x itself); return the packed flags (empty unless `keep`)."""
    keep = keep and act != "none"
    mask = torch.empty(bits.packed_size(y.numel()) if keep else 0, dtype=torch.uint8, device=y.device)
    strides = dense_strides(y)
    same = x.stride() == y.stride()
    if not (
        same and is_dense(y.shape, strides) and y.stride() == strides and (scale is None or _in_planes(y))
    ):
        if scale is not None and shift is not None:
            torch.addcmul(_broadcast(shift, x), x, _broadcast(scale, x), out=y)
        elif y is not x:
            y.copy_(x)
        marks = _activate_(y, act, low, high, keep)
        if marks is not None:
            ordered = torch.empty_strided(y.shape, strides, dtype=torch.bool, device=y.device)
            bits.pack(flat(ordered.copy_(marks)), mask)
        return mask
    source, target = flat(x), flat(y)
    a = _PerChannel(scale, y) if scale is not None else None
    b = _PerChannel(shift, y) if shift is not None else None
    for block, rows in _blocks(y, scale):
        part = target[block]
        if a is not None and b is not None and rows is not None:
            view = (-1, a.width)
            torch.addcmul(b.rows(rows), source[block].view(view), a.rows(rows), out=part.view(view))
        elif y is not x:
            part.copy_(source[block])
        marks = _activate_(part, act, low, high, keep)
        if marks is not None:
            bits.pack(marks, mask[block.start // 8 : bits.packed_size(block.stop)])
    return mask


def affine_act_plain(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float, keep: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    return y, _run(x, y, scale, shift, act, low, high, keep)


def affine_act_inplace_plain(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float, keep: bool
) -> Tensor:
    return _run(x, x, scale, shift, act, low, high, keep)


def _mask_block_(part: Tensor, mask: Tensor, act: str, slope: float) -> None:
    """Multiply the gradient block `part` by act' in place; `mask` holds the block's packed flags.

    The flags become words of all ones or all zeros that are and-ed with the values: exact for NaN and infinity, and
    on CPU a tenth of the time of `masked_fill_` or `where`.
    """
    word = _WORDS[part.dtype.itemsize]
    flags, values = bits.unpack(mask, part.numel()).to(word), part.view(word)
    if act == "leaky_relu":
        scaled = (part * slope).view(word).bitwise_and_(flags - 1)
        values.bitwise_and_(flags.neg_()).bitwise_or_(scaled)
    else:
        values.bitwise_and_(flags.sub_(1))


def affine_act_dx_plain(
    dy: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    act: str,
    slope: float,
    strides: Sequence[int],
    shift_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_strided(dy.shape, tuple(strides), dtype=dy.dtype, device=dy.device)
    in_order = dy.stride() == dx.stride()
    planes = scale is not None and not shift_gradient and in_order and _in_planes(dx)
    a = _PerChannel(scale, dx) if planes and scale is not None else None
    if not in_order:
        dx.copy_(dy)
    target = flat(dx)
    for block, rows in _blocks(dx, scale if planes else None):
        part = target[block]
        if a is not None and rows is not None:
            view = (-1, a.width)
            torch.mul(flat(dy)[block].view(view), a.rows(rows), out=part.view(view))
        elif in_order:
            part.copy_(flat(dy)[block])
        if mask is not None:
            _mask_block_(part, mask[block.start // 8 : bits.packed_size(block.stop)], act, slope)
    dshift = dx.new_empty(0)
    if shift_gradient:
        others = [d for d in range(dx.dim()) if d != 1]
        dshift = dx.sum(others, dtype=torch.promote_types(dx.dtype, torch.float32))
    if scale is not None and not planes:
        torch.mul(dx, _broadcast(scale, dx), out=dx)
    return dx, dshift


def inner_of(x: Tensor) -> int:
    """Neighbours in storage that share a channel: 1 in channels_last, H W in NCHW, 0 where x has gaps."""
    if x.is_contiguous():
        return x.numel() // max(x.shape[0] * x.shape[1], 1) if x.dim() > 1 else 1
    return 1 if is_channels_last(x) else 0


def fits(vector: Tensor | None) -> bool:
    """Whether kernels can read a per-channel vector."""
    return vector is None or (vector.dtype is torch.float32 and vector.is_contiguous())


def mask_for(y: Tensor, act: str, keep: bool) -> Tensor:
    """Room for the packed flags of y; empty where none are kept."""
    size = bits.packed_size(y.numel()) if keep and act != "none" else 0
    return torch.empty(size, dtype=torch.uint8, device=y.device)


def affine_act_native(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float, keep: bool
) -> tuple[Tensor, Tensor]:
    inner = inner_of(x)
    if not (inner and known(x) and fits(scale) and fits(shift)):
        return NotImplemented
    y = torch.empty_like(x)
    mask = mask_for(y, act, keep)
    kept = mask if keep and act != "none" else None
    native("affine_act")(y, kept, x, scale, shift, inner, CODES[act], low, high)
    return y, mask


def affine_act_inplace_native(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float, keep: bool
) -> Tensor:
    inner = inner_of(x)
    if not (inner and known(x) and fits(scale) and fits(shift)):
        return NotImplemented
    mask = mask_for(x, act, keep)
    kept = mask if keep and act != "none" else None
    native("affine_act")(x, kept, x, scale, shift, inner, CODES[act], low, high)
    return mask


def affine_act_dx_native(
    dy: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    act: str,
    slope: float,
    strides: Sequence[int],
    shift_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_strided(dy.shape, tuple(strides), dtype=dy.dtype, device=dy.device)
    inner = inner_of(dx)
    if not (inner and known(dy) and fits(scale)):
        return NotImplemented
    source = dy if dy.stride() == dx.stride() else dx.copy_(dy)
    channels = dy.shape[1] if dy.dim() > 1 else 1
    dshift = dy.new_empty(channels, dtype=torch.float32) if shift_gradient else dy.new_empty(0)
    native("affine_act_dx")(
        dx, dshift if shift_gradient else None, source, scale, mask, channels, inner, CODES[act], slope
    )
    return dx, dshift


def _fake_mask(x: Tensor, act: str, keep: bool) -> Tensor:
    size = bits.packed_size(x.numel()) if keep and act != "none" else 0
    return x.new_empty(size, dtype=torch.uint8)


def _fake(x, scale, shift, act, low, high, keep):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), _fake_mask(x, act, keep)


def _fake_inplace(x, scale, shift, act, low, high, keep):  # type: ignore[no-untyped-def]
    return _fake_mask(x, act, keep)


def _fake_dx(dy, scale, mask, act, slope, strides, shift_gradient):  # type: ignore[no-untyped-def]
    dx = torch.empty_strided(dy.shape, tuple(strides), dtype=dy.dtype, device=dy.device)
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dx, dy.new_empty(dy.shape[1] if shift_gradient else 0, dtype=wide if shift_gradient else dy.dtype)


_ARGUMENTS = "Tensor? scale, Tensor? shift, str act, float low, float high, bool keep"
affine_act = register(
    f"affine_act(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor)",
    affine_act_plain,
    _fake,
    affine_act_native,
    triton="affine_act",
)
affine_act_ = register(
    f"affine_act_(Tensor(a!) x, {_ARGUMENTS}) -> Tensor",
    affine_act_inplace_plain,
    _fake_inplace,
    affine_act_inplace_native,
    triton="affine_act",
)
affine_act_dx = register(
    "affine_act_dx(Tensor dy, Tensor? scale, Tensor? mask, str act, float slope, SymInt[] strides, "
    "bool shift_gradient) -> (Tensor, Tensor)",
    affine_act_dx_plain,
    _fake_dx,
    affine_act_dx_native,
    triton="affine_act",
)
