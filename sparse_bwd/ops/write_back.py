"""write_back: the trained slices of layers copied into their full weights, in one call for any number of layers.

A slot says where the slices of one tensor live: along dimension 0 (output channels, biases), along dimension 1 (input
channels), or, for input channels of a grouped layer, in column c mod (C_in/g) of the rows of group c // (C_in/g).

On a GPU a copy per layer serves until it is measured whether Triton's single launch for all of them is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.ops.backend import direct, native, register
from sparse_bwd.ops.layout import is_channels_last


def _channel_view(full: Tensor, groups: int) -> Tensor:
    """A weight [C_out, C_in/g, kh, kw] of g > 1 groups, viewed as [g, C_in/g, C_out/g, kh, kw]."""
    view: Tensor = full.unflatten(0, (groups, -1)).transpose(1, 2)
    return view


def read_slices(full: Tensor, index: Tensor | None, dim: int, groups: int) -> Tensor:
    """The slices as a new tensor in compact shape and in the memory format of `full`; inverse of `write_back`.

    Gradients arrive in that format, so that autograd takes them over without a copy.
    """
    if groups > 1 and dim == 1:
        view = _channel_view(full, groups)
        index = torch.arange(groups * view.shape[1], device=full.device) if index is None else index
        slices: Tensor = view[index // view.shape[1], index % view.shape[1]]
    else:
        slices = full.clone() if index is None else full.index_select(dim, index)
    return slices.to(memory_format=torch.channels_last) if is_channels_last(full) else slices


def write_back_plain(
    weights: Sequence[Tensor],
    slices: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    groups: Sequence[int],
) -> None:
    for full, part, index, dim, group in zip(weights, slices, indices, dims, groups, strict=True):
        if group > 1 and dim == 1:
            view = _channel_view(full, group)
            index = torch.arange(group * view.shape[1], device=full.device) if index is None else index
            view[index // view.shape[1], index % view.shape[1]] = part
        elif index is None:
            full.copy_(part)
        else:
            full.index_copy_(dim, index, part)


def write_back_native(
    weights: Sequence[Tensor],
    slices: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    groups: Sequence[int],
) -> Any:
    for full, part in zip(weights, slices, strict=True):
        if not (_dense(full) and _dense(part) and full.dtype is part.dtype):
            return NotImplemented
    native("write_back")(weights, slices, indices, dims, groups)


def write_back(
    weights: Sequence[Tensor],
    slices: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    dims: Sequence[int],
    groups: Sequence[int],
) -> None:
    """Copy the slices into their weights, by the operator, or past it where nobody watches."""
    arguments = (weights, slices, indices, dims, groups)
    if not direct(weights[0]) or write_back_native(*arguments) is NotImplemented:
        torch.ops.sparse_bwd.write_back.default(*arguments)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or is_channels_last(x)


def _fake(weights, slices, indices, dims, groups):  # type: ignore[no-untyped-def]
    return None


register(
    "write_back(Tensor(a!)[] weights, Tensor[] slices, Tensor?[] indices, int[] dims, int[] groups) -> ()",
    write_back_plain,
    _fake,
    write_back_native,
    devices=("cpu",),
    triton="write_back",
)
