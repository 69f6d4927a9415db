"""Several sets of trained channels of one base as one.

A channel that one set holds is taken as it is. One that several hold, with other values, is a collision:

    refuse     ValueError
    average    sum w_i v_i / sum w_i over the sets that hold it, in float64; of integers (counts of batches) the largest

This is the rule of HeteroFL (arXiv 2010.01264): who did not train a channel has no say in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_bwd.nn.slot import Slot
from sparse_bwd.ops.write_back import read_slices
from sparse_bwd.sharing.parts import Part, bits
from sparse_bwd.sharing.trained import Trained

COLLISIONS = ("refuse", "average")


class _Entry(NamedTuple):
    """The part of one tensor in one of the sets."""

    number: int  # of the set, from 1
    part: Part
    weight: float


def merge(
    sets: Sequence[Trained], collisions: str = "refuse", weights: Sequence[float] | None = None
) -> Trained:
    """One set with the channels of all. See `sparse_bwd.merge_trained`."""
    if collisions not in COLLISIONS:
        raise ValueError(f"collisions is {collisions!r}; it must be 'refuse' or 'average'.")
    if not sets:
        raise ValueError("There is nothing to merge; give at least one file.")
    weights = [1.0] * len(sets) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(sets) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"weights must be {len(sets)} positive numbers, one per file, such as its number of images; got {weights}."
        )
    base = _common_base(sets)
    parts = {}
    for name in dict.fromkeys(name for trained in sets for name in trained.parts):
        entries = [
            _Entry(number, trained.parts[name], weight)
            for number, (trained, weight) in enumerate(zip(sets, weights, strict=True), 1)
            if name in trained.parts
        ]
        parts[name] = _merge_tensor(name, entries, collisions)
    kept = {
        name: word for name, word in base.items() if name not in parts or parts[name].slot.index is not None
    }
    first = sets[0].selection
    same = all(trained.selection == first for trained in sets)
    return Trained(parts, kept, first if same else None, _common_notes(sets))


def _common_base(sets: Sequence[Trained]) -> dict[str, str]:
    """Hashes of all sets together; ValueError if two differ."""
    base: dict[str, tuple[int, str]] = {}
    for number, trained in enumerate(sets, 1):
        for name, word in trained.base.items():
            other, known = base.setdefault(name, (number, word))
            if known != word:
                raise ValueError(
                    f"File {other} and file {number} were trained from different base weights ('{name}' differs), so "
                    "their channels do not belong into one network; merge files of one base."
                )
    return {name: word for name, (_, word) in base.items()}


def _common_notes(sets: Sequence[Trained]) -> dict[str, str]:
    notes: dict[str, str] = {}
    for trained in sets:
        for key, word in trained.notes.items():
            notes[key] = word if notes.get(key, word) == word else f"{notes[key]}; {word}"
    return notes


def _merge_tensor(name: str, entries: list[_Entry], collisions: str) -> Part:
    slot = _common_slot(name, entries)
    axis = 0 if slot.groups > 1 else slot.dim
    indices = [_index(entry.part, slot) for entry in entries]
    values = [_slices(entry.part, slot) for entry in entries]
    if values[0].dim() == 0:  # a count has no channels
        indices, values = [torch.zeros(1, dtype=torch.int64)] * len(values), [v.reshape(1) for v in values]
    union = torch.cat(indices).unique()
    places = [torch.searchsorted(union, index) for index in indices]
    shape = list(values[0].shape)
    shape[axis] = len(union)
    merged = values[0].new_zeros(shape)
    owner = torch.zeros(
        len(union), dtype=torch.int64
    )  # number of the first set that holds a channel; 0: none yet
    clash = torch.zeros(len(union), dtype=torch.bool)
    for entry, place, value in zip(entries, places, values, strict=True):
        held = owner[place] > 0
        if bool(held.any()):
            differs = bits(merged.index_select(axis, place)) != bits(value)
            clash[place] |= held & differs.movedim(axis, 0).reshape(len(place), -1).any(1)
            if collisions == "refuse" and bool(clash.any()):
                raise _collision(name, union[clash], int(owner[clash][0]), entry.number)
        merged.index_copy_(axis, place[~held], value.index_select(axis, (~held).nonzero().flatten()))
        owner[place[~held]] = entry.number
    if bool(clash.any()):
        merged = _averaged(merged, clash, axis, places, values, [entry.weight for entry in entries])
    if slot.index is None:
        return Part(slot, merged.reshape(entries[0].part.values.shape))
    return Part(Slot(union, slot.dim, slot.groups), merged)


def _averaged(
    merged: Tensor,
    clash: Tensor,
    axis: int,
    places: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[float],
) -> Tensor:
    """`merged` with the mean over those that hold it in every channel of `clash`."""
    rows = clash.nonzero().flatten()
    if not merged.is_floating_point():
        for place, value in zip(places, values, strict=True):
            both = torch.maximum(merged.index_select(axis, place), value)
            merged.index_copy_(axis, place, both)
        return merged
    total = torch.zeros_like(merged, dtype=torch.float64)
    share = torch.zeros(len(clash), dtype=torch.float64)
    for place, value, weight in zip(places, values, weights, strict=True):
        total.index_add_(axis, place, value.double(), alpha=weight)
        share[place] += weight
    across = [1] * merged.dim()
    across[axis] = -1
    mean = (total / share.view(across)).to(merged.dtype)
    return merged.index_copy_(axis, rows, mean.index_select(axis, rows))


def _common_slot(name: str, entries: list[_Entry]) -> Slot:
    """Where the merged slices live; index None if one set holds the whole tensor. ValueError for rows and columns."""
    kinds = {
        (e.part.slot.dim, e.part.slot.groups): e.number for e in entries if e.part.slot.index is not None
    }
    if len(kinds) > 1:
        one, other = sorted(kinds.values())[:2]
        raise ValueError(
            f"'{name}' was trained on axis 'out' in one of the files {one} and {other} and on axis 'in' in the other, "
            "where every two channels cross; train both on one axis, or load one and train on from there."
        )
    dtypes = {e.part.values.dtype for e in entries}
    if len(dtypes) > 1:
        raise ValueError(
            f"'{name}' has the types {', '.join(sorted(map(str, dtypes)))} in the files; it needs one."
        )
    (dim, groups), *_ = [*kinds, (0, 1)]
    everything = any(e.part.slot.index is None for e in entries)
    return Slot(None, 0, 1) if everything and not kinds else Slot(torch.empty(0), dim, groups)


def _slices(part: Part, slot: Slot) -> Tensor:
    """The values of a part in the compact shape of `slot`."""
    if part.slot.index is None and slot.index is not None:
        return read_slices(part.values, None, slot.dim, slot.groups)
    return part.values


def _index(part: Part, slot: Slot) -> Tensor:
    """The channels of a part, all of them named."""
    if part.slot.index is not None:
        return part.slot.index
    if part.values.dim() == 0:
        return torch.zeros(1, dtype=torch.int64)
    return torch.arange(part.values.shape[slot.dim] * slot.groups)


def _collision(name: str, channels: Tensor, one: int, other: int) -> ValueError:
    shown = ", ".join(map(str, channels[:5].tolist())) + (", ..." if len(channels) > 5 else "")
    return ValueError(
        f"File {one} and file {other} both trained channels {shown} of '{name}', to different values; give "
        "collisions='average' to take their mean, or train channels that do not overlap."
    )
