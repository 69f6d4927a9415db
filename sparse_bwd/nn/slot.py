"""Slots: where the slices of a compact Parameter live in their full tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TRAINABLE = {"weight": "trainable_weight", "bias": "trainable_bias"}


@dataclass(frozen=True, eq=False)
class Slot:
    """Where the slices of one compact Parameter live in its full tensor."""

    index: Tensor | None  # int64 on the layer's device; None = all
    dim: int
    groups: int

    @property
    def axis(self) -> int:
        """The dimension of the compact tensor that counts channels."""
        return self.dim if self.groups == 1 else 0

    @property
    def whole(self) -> bool:
        """Whether the slices are the full tensor in its own shape, so that both share one memory."""
        return self.index is None and (self.dim == 0 or self.groups == 1)

    def is_like(self, other: Slot) -> bool:
        """Whether both name the same slices."""
        if (self.dim, self.groups, self.index is None) != (other.dim, other.groups, other.index is None):
            return False
        return self.index is None or other.index is None or torch.equal(self.index, other.index)


class Synced(NamedTuple):
    """Version counters of a full tensor and its compact Parameter when both last agreed."""

    full: Tensor
    full_version: int
    part: Tensor
    part_version: int
