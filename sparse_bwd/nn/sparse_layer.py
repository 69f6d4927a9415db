"""What layers with selectable channels share: how a selection is placed, and what policies need to know of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from sparse_bwd.nn.compact import CompactLayer
from sparse_bwd.nn.slot import Slot


class SparseLayer(CompactLayer, ABC):
    """A layer that trains selected channels only. It keeps `weight` and `bias` whole and frozen under their names."""

    if TYPE_CHECKING:
        weight: Tensor

    groups: int = 1
    one_axis: bool = False  # axis "in" means the same channels as "out"

    def _convert(self) -> None:
        """Add the compact state: everything frozen, nothing selected."""
        self._init_compact()
        for name in ("weight", "bias"):
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(False)

    @abstractmethod
    def num_channels(self, axis: str = "out") -> int:
        """Channels on the axis: of the output ("out") or of the input ("in")."""

    @abstractmethod
    def channel_cost(self, axis: str = "out") -> int:
        """Weights of one channel (its bias is not counted)."""

    @abstractmethod
    def set_channels(
        self, index: Iterable[int] | Tensor | None, axis: str = "out", bias: str = "selected"
    ) -> None:
        """Train the channels `index` (None = all, empty = none) of `axis` from now on.

        Args:
            bias: "selected" (of the selected outputs; axis "out" only), "all" or "none".

        Raises:
            ValueError, TypeError: the index or a word does not fit the layer.
        """

    @abstractmethod
    def by_channel(self, values: Tensor) -> Tensor:
        """View of an input or output as [samples, channels, *]: one vector per sample and channel."""

    @abstractmethod
    def is_batched(self, values: Tensor) -> bool:
        """Whether the first axis of an input counts samples."""

    def stock_name(self, owner: str, kind: str) -> str:
        """Name of the full "weight" or "bias" in the stock model, where this layer's name is `owner`."""
        return f"{owner}.{kind}" if owner else kind

    def as_rows(self, values: Tensor) -> Tensor:
        """View of a tensor shaped like the weight as [C_out, C_in/g, *]."""
        return values

    def positions(self, x: Tensor, y: Tensor) -> int:
        """Multiplications that a weight takes part in, samples x places."""
        return y.numel() // self.num_channels("out")


def check_words(axis: str, bias: str, what: str) -> None:
    """Refuse an axis or a bias mode that does not exist."""
    if axis not in ("out", "in"):
        raise ValueError(f"{what}: axis must be 'out' or 'in', not {axis!r}.")
    if bias not in ("selected", "all", "none"):
        raise ValueError(f"{what}: bias must be 'selected', 'all' or 'none', not {bias!r}.")
    if axis == "in" and bias == "selected":
        raise ValueError(f"{what}: on axis 'in' no output is selected, so bias must be 'all' or 'none'.")


def place_selection(
    layer: CompactLayer, chosen: Tensor | None, axis: str, bias: str, dim: int, groups: int
) -> None:
    """Make the slots of a weight-bearing layer from a checked selection and install them.

    Args:
        dim, groups: where the slices of a channel live in the weight; see `Slot`.
    """
    full = layer._full("weight")
    layer_index = layer.own_index(chosen, full.device)
    # An index of all channels is no gather at all.
    index = None if chosen is not None and chosen.numel() == layer.num_channels(axis) else layer_index
    slots: dict[str, Slot] = {}
    if index is None or index.numel():
        slots["weight"] = Slot(index, dim, groups)
    if layer._parameters.get("bias") is not None:
        if bias == "all":
            slots["bias"] = Slot(None, 0, 1)
        elif bias == "selected" and "weight" in slots:
            slots["bias"] = Slot(index, 0, 1)
    layer._place(slots)
    layer._index, layer.axis, layer.bias_mode = layer_index, axis, bias
