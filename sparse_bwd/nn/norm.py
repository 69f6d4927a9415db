"""What all norms share: a mode, and a shift of which selected channels are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparse_bwd.nn.compact import CompactLayer
from sparse_bwd.nn.index import as_index
from sparse_bwd.nn.slot import Slot

MODES = ("frozen", "bias", "train")


def check_mode(mode: str) -> None:
    """Refuse a mode that no norm has."""
    if mode not in MODES:
        raise ValueError(f"batch_norm must be 'frozen', 'bias' or 'train', not {mode!r}.")


class ShiftedNorm(CompactLayer):
    """A norm in one of three modes, which `model.train()` does not change.

    "frozen": nothing is trained but the shift of channels that a selection names; "bias": the shift is trained, whole
    unless a selection names channels; "train": scale and shift are trained whole, as PyTorch's; nothing is selected.
    """

    mode: str

    def _convert(self, mode: str) -> None:
        self._init_compact()
        self.set_mode(mode)

    def _strip_compact(self) -> None:
        super()._strip_compact()
        del self.mode

    @property
    def has_shift(self) -> bool:
        """Whether there is a shift that could be trained."""
        return self._parameters.get("bias") is not None

    def set_mode(self, mode: str) -> None:
        """Change the mode; the shift is then trained whole ("bias", "train") or not at all ("frozen").

        Raises:
            ValueError: an unknown mode.
        """
        check_mode(mode)
        self.mode = mode
        for name, flag in self._original_flags.items():
            self._full(name).requires_grad_(flag and mode == "train")
        self.set_channels(None if mode == "bias" else [])

    def set_channels(self, index: Iterable[int] | Tensor | None) -> None:
        """Train the shift of the channels `index` (None = all, empty = none) from now on.

        Raises:
            ValueError: the index does not fit, or the norm has no shift or trains as PyTorch's (mode "train").
        """
        kind = type(self).__name__
        chosen = as_index(index, self.num_channels(), kind)
        wanted = chosen is None or chosen.numel() > 0
        if wanted and self.mode == "train":
            raise ValueError(
                "A norm in mode 'train' trains its whole scale and shift; it cannot be selected."
            )
        if wanted and not self.has_shift and index is not None:
            raise ValueError(f"This {kind} has no shift, so its channels cannot be trained.")
        has_shift = self.has_shift
        placed = self.own_index(chosen, self._full("bias").device) if has_shift else None
        self._place({"bias": Slot(placed, 0, 1)} if wanted and has_shift else {})
        self._index = placed if has_shift else torch.zeros(0, dtype=torch.int64)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"
