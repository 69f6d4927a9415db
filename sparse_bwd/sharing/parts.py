"""The part of one tensor that training has changed: whole rows, or whole input channels, and which.

    rows       slices along dimension 0
    columns    slices along dimension 1; of g groups, column c mod (C_in/g) of the rows of group c // (C_in/g)

Of both the smaller one that holds every changed element is taken, the whole tensor where neither leaves anything out.
Elements are compared by their bits, so that what is put back is what was there.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_bwd.nn.slot import Slot
from sparse_bwd.ops.write_back import read_slices, write_back_plain

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(NamedTuple):
    """Slices of one tensor, in compact shape, and where they belong; index None: the whole tensor."""

    slot: Slot
    values: Tensor


def digest(tensor: Tensor) -> str:
    """A hash of type, shape and values (BLAKE2b, 32 hexadecimal digits), the same in any memory layout."""
    plain = tensor.detach().cpu().contiguous()
    words = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)} ".encode(), digest_size=16)
    if plain.numel():
        words.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return words.hexdigest()


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals NaN and -0.0 differs from 0.0."""
    integers = _INTEGERS.get(tensor.element_size())
    return tensor if integers is None else tensor.view(integers)


def whole(tensor: Tensor) -> Part:
    """The part that is everything."""
    return Part(Slot(None, 0, 1), tensor.detach().cpu().clone())


def changed_part(now: Tensor, base: Tensor, groups: int, selected: Slot | None) -> Part | None:
    """What of `now` differs from `base` (same shape and type) or is selected; None if nothing does.

    `groups` > 0: a weight with input channels, in so many groups; 0: any other tensor, which has rows alone.
    """
    differs = bits(now) != bits(base)
    if selected is not None:
        flags = torch.zeros_like(differs)
        ones = torch.ones_like(read_slices(flags, selected.index, selected.dim, selected.groups))
        write_back_plain([flags], [ones], [selected.index], [selected.dim], [selected.groups])
        differs |= flags
    if not bool(differs.any()):
        return None
    if differs.dim() == 0:
        return whole(now)
    slot = _smallest_slot(differs, groups)
    return Part(slot, read_slices(now.detach(), slot.index, slot.dim, slot.groups).cpu())


def _smallest_slot(differs: Tensor, groups: int) -> Slot:
    """The fewest rows or columns that hold every True."""
    rows = differs.flatten(1).any(1) if differs.dim() > 1 else differs
    columns = None
    if groups and differs.dim() > 1:
        by_channel = differs.unflatten(0, (groups, -1)).transpose(1, 2)
        columns = by_channel.flatten(2).any(2).flatten()
    mean = rows.double().mean()
    if columns is not None and columns.double().mean() < mean:
        return Slot(columns.nonzero().flatten().cpu(), 1, groups)
    return Slot(None, 0, 1) if mean == 1 else Slot(rows.nonzero().flatten().cpu(), 0, 1)


def put(part: Part, target: Tensor) -> None:
    """Write a part into its tensor, in place."""
    slot = part.slot
    index = None if slot.index is None else slot.index.to(target.device)
    write_back_plain([target], [part.values.to(target.device)], [index], [slot.dim], [slot.groups])


def misfit(part: Part, target: Tensor) -> str | None:
    """Why a part cannot be put into a tensor, as the end of a sentence; None if it can."""
    values, (index, dim, groups) = part.values, (part.slot.index, part.slot.dim, part.slot.groups)
    if values.dtype != target.dtype:
        return f"holds {values.dtype}, the model {target.dtype}"
    same = index is None and values.shape == target.shape
    fits = same or (index is not None and _fits(values.shape, index, dim, groups, target.shape))
    return None if fits else f"does not fit the model's shape {tuple(target.shape)}"


def _fits(shape: torch.Size, index: Tensor, dim: int, groups: int, full: torch.Size) -> bool:
    """Whether slices of `shape` are those of `index` in a tensor of shape `full`."""
    if dim >= len(full) or (groups > 1 and (dim != 1 or full[0] % groups)):
        return False
    channels = full[dim] * groups
    grouped = (len(index), full[0] // groups, *full[2:])
    plain = (*full[:dim], len(index), *full[dim + 1 :])
    inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < channels)
    return inside and tuple(shape) == (grouped if groups > 1 else plain)
