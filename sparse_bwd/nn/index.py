"""Index vectors: the channels that a user names, checked, and the same vectors on another device."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Move = Callable[[Tensor | None], Tensor | None]


def as_index(index: Iterable[int] | Tensor | None, count: int, what: str) -> Tensor | None:
    """A sorted, unique int64 CPU index into `count` channels; None stays None (= all).

    Raises:
        TypeError: the index holds something other than integers.
        ValueError: it repeats a channel or leaves 0..count-1.
    """
    if index is None:
        return None
    values = torch.as_tensor(index if isinstance(index, Tensor) else list(index)).cpu()
    if values.numel() == 0:
        return torch.empty(0, dtype=torch.int64).zero_()
    if (
        values.dtype.is_floating_point
        or values.dtype.is_complex
        or values.dtype == torch.bool
        or values.dim() != 1
    ):
        raise TypeError(
            f"{what}: channels must be a 1-d list of integers, not {values.dtype} of shape {tuple(values.shape)}."
        )
    values = values.to(torch.int64).sort().values
    if bool((values[1:] == values[:-1]).any()):
        raise ValueError(f"{what}: a channel is named twice; name each selected channel once.")
    if int(values[0]) < 0 or int(values[-1]) >= count:
        wrong = int(values[0]) if int(values[0]) < 0 else int(values[-1])
        raise ValueError(f"{what} has channels 0 to {count - 1}; channel {wrong} does not exist.")
    return values


def beside(device: torch.device) -> torch.device:
    """Where the index of a tensor on `device` lives: there, but on the CPU for meta tensors, which hold no values."""
    return torch.device("cpu") if device.type == "meta" else device


def mover(device: torch.device) -> Move:
    """A function that moves index vectors to `device`; a vector that is held in two places stays one.

    None is a view of another afterwards, for torch.compile takes the length of what is behind a view as a constant.
    """
    device = beside(device)
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def move(vector: Tensor | None) -> Tensor | None:
        if vector is None:
            return None
        if id(vector) not in moved:
            there = vector.to(device)
            moved[id(vector)] = vector, there.clone() if there._is_view() else there
        return moved[id(vector)][1]

    return move
