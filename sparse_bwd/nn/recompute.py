"""Outputs that are computed again in backward: y = f(x), where somebody keeps x anyway and f costs one pass.

A norm over features and a smooth activation (GELU, SiLU, Hardswish) need their input x for their own gradient. The
layer behind needs y for its weight gradient. Instead of both, only x is kept: the first layer notes on y how y was made
(an `Origin`), and the second, when it would keep y, keeps what the origin names and makes y again, bit by bit the same.

    kept by the pair    e X instead of e X + e Y
    extra work          one pass over y in backward for each layer that reads it; y is freed before its dx is made

An origin is used only while it is true: not after an in-place change of y (version counter), and not on the other side
of a border at which saved tensors change hands (activation checkpointing, offloading), where counts must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ATTRIBUTE = "_sparse_bwd_origin"


class Origin(NamedTuple):
    """y = compute(*tensors); `tensors` are kept by whoever made y."""

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    version: int
    hooks: Any


def _hooks() -> Any:
    """What takes saved tensors over at the moment, or None."""
    pair = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if pair is None else pair[0]


def note_origin(y: Tensor, compute: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Note on y that it is compute(*tensors), all of which its maker keeps for backward; returns y.

    `compute` must depend on nothing but its arguments: neither on random numbers nor on autocast.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return y
    held = tuple(
        t if t is None or t.is_leaf else t.detach() for t in tensors
    )  # a graph of its own needs nobody
    setattr(y, _ATTRIBUTE, Origin(compute, held, y._version, _hooks()))
    return y


def origin_of(y: Tensor) -> Origin | None:
    """How y can be made again, if that is known and still true."""
    if torch.compiler.is_compiling():
        return None
    found: Origin | None = getattr(y, _ATTRIBUTE, None)
    if found is None or found.version != y._version or found.hooks is not _hooks():
        return None
    return found


def carry_origin(y: Tensor, cast: Tensor) -> Tensor:
    """Note on `cast`, which is y in another dtype, how it can be made again; returns `cast`."""
    found = origin_of(y)
    if found is None or cast is y:
        return cast
    compute, dtype = found.compute, cast.dtype
    return note_origin(cast, lambda *tensors: compute(*tensors).to(dtype), *found.tensors)
