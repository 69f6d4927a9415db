"""What all convolutions share: channels on two axes, groups, and the plan of their weight gradient.

A transposed convolution is the adjoint of a convolution with inputs and outputs exchanged, and holds the weight of
that: [C_in, C_out/g, *]. Its output channels are therefore selected as the other's input channels, and the reverse.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sparse_bwd.nn.compiled import of_any_length
from sparse_bwd.nn.index import Move, as_index, mover
from sparse_bwd.nn.sparse_layer import SparseLayer, check_words, place_selection
from sparse_bwd.ops.conv2d_dw import Plan, make_plan


class ConvLayer(SparseLayer):
    """A convolution of any dimension, transposed or not, that trains selected channels."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    _plan: Plan

    def _convert(self) -> None:
        super()._convert()
        self._plan = Plan(None, None, None, None, self.groups)

    def _strip_compact(self) -> None:
        super()._strip_compact()
        del self._plan

    @property
    def depthwise(self) -> bool:
        """One input and one output channel per group, so that both axes are the same."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def one_axis(self) -> bool:  # type: ignore[override]
        """Whether axis "in" means the same channels as "out"."""
        return self.depthwise

    def num_channels(self, axis: str = "out") -> int:
        """Channels on the axis: output channels ("out") or input channels ("in")."""
        return self.out_channels if axis == "out" else self.in_channels

    def channel_cost(self, axis: str = "out") -> int:
        """Weights of one channel, groups respected (its bias is not counted)."""
        across = self.in_channels if axis == "out" else self.out_channels
        cost = across // self.groups
        for size in self.kernel_size:
            cost *= size
        return cost

    def set_channels(
        self, index: Iterable[int] | Tensor | None, axis: str = "out", bias: str = "selected"
    ) -> None:
        """Train the channels `index` (None = all, empty = none) of `axis` from now on.

        Args:
            axis: "out" or "in"; in a depthwise layer "in" means the same channels and is stored as "out".
            bias: "selected" (of the selected outputs; axis "out" only), "all" or "none".

        Raises:
            ValueError, TypeError: the index or a word does not fit the layer.
        """
        kind = type(self).__name__
        check_words(axis, bias, kind)
        axis = "out" if self.depthwise else axis
        chosen = as_index(index, self.num_channels(axis), f"{kind}, axis '{axis}',")
        every = chosen is None or chosen.numel() == self.num_channels(axis)
        seen = self._seen(axis, every)
        plan = Plan(None, None, None, None, self.groups)
        if chosen is None or chosen.numel():
            sizes = (self.in_channels, self.out_channels)
            plan = make_plan(
                None if every else chosen, seen, *(sizes[::-1] if self.transposed else sizes), self.groups
            )
        place_selection(
            self, chosen, axis, bias, 0 if seen == "out" else 1, self.groups if seen == "in" else 1
        )
        # The plan shares the layer's own index where it can, so that backward keeps one vector and not two.
        keep = self._index if plan.keep is chosen else plan.keep
        rows = self._index if plan.rows is chosen else plan.rows
        self._use(plan._replace(keep=keep, rows=rows))
        self._move_index(mover(self._full("weight").device))

    def _seen(self, axis: str, every: bool) -> str:
        """The axis of the convolution that a transposed one is the adjoint of; all of several groups are the weight."""
        if not self.transposed or self.depthwise:
            return axis
        return "in" if axis == "out" and not (every and self.groups > 1) else "out"

    def _use(self, plan: Plan) -> None:
        self._plan = plan

    def _move_index(self, move: Move) -> None:
        super()._move_index(move)
        keep, spread, rows, pick, groups = self._plan
        self._plan = Plan(move(keep), move(spread), move(rows), move(pick), groups)
        for vector in self._plan[:4] if self.any_length else ():
            of_any_length(vector)

    def by_channel(self, values: Tensor) -> Tensor:
        """[N, C, *] as it is; without a batch one sample."""
        return values if self.is_batched(values) else values.unsqueeze(0)

    def is_batched(self, values: Tensor) -> bool:
        return values.dim() == len(self.kernel_size) + 2

    def as_rows(self, values: Tensor) -> Tensor:
        """View of a tensor shaped like the weight as [C_out, C_in/g, *]."""
        if not self.transposed or self.depthwise:
            return values
        apart: Tensor = values.unflatten(0, (self.groups, -1))
        return apart.transpose(1, 2).flatten(0, 1)

    def positions(self, x: Tensor, y: Tensor) -> int:
        counted = x if self.transposed else y
        return counted.numel() // (self.in_channels if self.transposed else self.out_channels)
