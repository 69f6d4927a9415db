"""Cost of every channel, and the greedy prefix under a budget (METHOD sections 1.3 and 4).

A table has one row per channel, ordered by (layer, channel); layers in `named_modules` order. Everything here is
vectorised and runs on the CPU: the largest usual networks have some ten thousand channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sparse_bwd.nn import layers
from sparse_bwd.selection.selection import Channels, Selection, check_axis


@dataclass(frozen=True)
class CostTable:
    """Channels that a policy may select, in rows.

    names: the selectable layers; sizes: their numbers of channels; unit: the weights of one channel of each.
    total: weights of all swapped layers outside `always_train`, also of those that policies skip; a fraction is of it.
    """

    axis: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    unit: tuple[int, ...]
    total: int

    @cached_property
    def cost(self) -> Tensor:
        """Weights of each channel, int64 [rows]."""
        return torch.repeat_interleave(torch.tensor(self.unit, dtype=torch.int64), self._counts)

    @cached_property
    def layer(self) -> Tensor:
        """Position in `names` of each channel's layer, int64 [rows]."""
        return torch.repeat_interleave(self._counts)

    @cached_property
    def channel(self) -> Tensor:
        """Number of each channel within its layer, int64 [rows]."""
        starts = self._counts.cumsum(0) - self._counts
        return torch.arange(len(self)) - starts[self.layer]

    @property
    def _counts(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.int64)

    @property
    def channels(self) -> dict[str, int]:
        """Number of channels of each layer, by name."""
        return dict(zip(self.names, self.sizes, strict=True))

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes that the table's tensors take, and a selection of all its rows."""
        return 4 * 8 * len(self)

    @property
    def cheapest(self) -> int:
        """Weights of the cheapest channel."""
        return min(self.unit)

    def selection(self, rows: Tensor, bias: str = "selected") -> Selection:
        """The selection that trains exactly `rows` (int64, any order); layers without a row are absent."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[rows] = True
        parts = zip(self.names, chosen.split(self.sizes), strict=True)
        return Selection(
            {
                name: Channels(part.nonzero().flatten(), self.axis, bias)
                for name, part in parts
                if bool(part.any())
            }
        )

    def within(self, order: Tensor, kept: Tensor) -> Tensor:
        """Rows of the layers that `kept` has rows of, such that any prefix past the first ones opens the same layers.

        First the best row of each such layer, or all of them where `kept` has all, then the others in their order but
        the last of each layer, which would train it whole.

        Args:
            order: rows, best first.
            kept: rows.
        """
        now = torch.bincount(self.layer[kept], minlength=len(self.sizes))
        order = order[now[self.layer[order]] > 0]
        layer = self.layer[order]
        rank = torch.empty(len(order), dtype=torch.int64)  # of each row within its layer
        for i in now.nonzero().flatten().tolist():
            mine = (layer == i).nonzero().flatten()
            rank[mine] = torch.arange(len(mine))
        whole = now == self._counts
        must = (rank == 0) | whole[layer]
        may = ~must & (rank < self._counts[layer] - 1)
        return torch.cat([order[must], order[may]])

    def rows(self, selection: Selection) -> Tensor:
        """The rows that a selection trains, in order; the inverse of `selection`."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for name, part in zip(self.names, chosen.split(self.sizes), strict=True):
            if (channels := selection.get(name)) is not None:
                part[slice(None) if channels.index is None else channels.index] = True
        return chosen.nonzero().flatten()

    def gather(self, values: Mapping[str, Tensor]) -> Tensor:
        """One value per row from `values`: name -> [channels]."""
        return torch.cat([values[name] for name in self.names])


def cost_table(model: nn.Module, axis: str = "out") -> CostTable:
    """Table of the channels of `model` that policies may select; ValueError if the model has no swapped layer."""
    check_axis(axis)
    swapped = layers(model)
    if not swapped:
        raise ValueError("The model has no swapped layers to select from; call sb.convert(model) first.")
    total = sum(layer.num_channels(axis) * layer.channel_cost(axis) for layer in swapped.values())
    open_to_policies = {name: layer for name, layer in swapped.items() if layer.selectable}
    if not open_to_policies:
        raise ValueError(
            "Every swapped layer had requires_grad=False before convert(), which policies respect; "
            "set requires_grad=True on the weights that may be trained before convert(), or use sb.apply()."
        )
    return CostTable(
        axis=axis,
        names=tuple(open_to_policies),
        sizes=tuple(layer.num_channels(axis) for layer in open_to_policies.values()),
        unit=tuple(layer.channel_cost(axis) for layer in open_to_policies.values()),
        total=total,
    )


def prefix_length(cost: Tensor, budget: int) -> int:
    """Largest j with cost[:j].sum() <= budget; `cost` is int64 and positive, so the sums are exact and increasing."""
    return int(torch.searchsorted(cost.cumsum(0), budget, right=True))


def greedy_prefix(score: Tensor, cost: Tensor, budget: int, parity: bool = False) -> Tensor:
    """Rows of the best channels that fit the budget, stopping at the first that does not (METHOD 1.3).

    Args:
        score: [rows], higher is better; equal scores keep the order of the rows, which is (layer, channel).
        cost: [rows] int64 weights per channel.
        budget: weights, >= 0.
        parity: the rule of the paper's code, which drops every channel that ties with the first rejected one.
    """
    order = torch.sort(score, descending=True, stable=True).indices
    length = prefix_length(cost[order], budget)
    chosen = order[:length]
    if parity and length < len(order):
        chosen = chosen[score[chosen] > score[order[length]]]
    return chosen
