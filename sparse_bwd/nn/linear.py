"""SparseLinear: y = x W^T + b, with gradients of the selected channels only.

    dx = dy W                  when x needs a gradient; keeps W (a Parameter: 0 bytes)
    dw = linear_dw(x, dy)      when channels are selected; keeps x (axis "out") or x[..., selected] (axis "in")
    db = sum dy                keeps nothing

Bytes kept: 0 with nothing selected; e X on axis "out"; e X k / C_in on axis "in"; 8 k for the index.
Extra multiplications: none; a weight gradient costs k / C of dense.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.compact import CompactLayer
from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.index import as_index
from sparse_bwd.nn.slot import Slot
from sparse_bwd.ops.linear_dw import bias_gradient, linear_dw


class LinearFunction(Function):
    """Arguments: x, full weight and bias (frozen), compact weight and bias, columns of x to keep (axis "in") or None,
    rows of dy that enter dw (axis "out") or None, rows of dy that enter db ("rows": the same; torch.compile wants no
    tensor twice) or None."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor | None,
        part_bias: Tensor | None,
        keep: Tensor | None,
        rows: Tensor | None,
        bias_rows: Tensor | str | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        # Beyond two dimensions PyTorch returns a view, which nobody might overwrite once a Function has returned it.
        result: Tensor = y if y.dim() == 2 else torch.ops.aten._unsafe_view(y, y.shape)
        return result

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, part, part_bias, keep, rows, bias_rows = inputs
        ctx.same_rows = isinstance(bias_rows, str)
        bias_rows = rows if ctx.same_rows else bias_rows
        needs_dx, needs_dw, needs_db = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[3],
            ctx.needs_input_grad[4],
        )
        kept = (x if keep is None else x.index_select(-1, keep)) if needs_dw else None
        ctx.save_for_backward(
            kept, weight if needs_dx else None, part if needs_dw else None, rows if needs_dw else None,
            bias_rows if needs_db else None,
        )  # fmt: skip
        ctx.dtypes = [None if p is None else p.dtype for p in (part, part_bias)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("SparseLinear")
        x, weight, _, rows, bias_rows = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy.matmul(weight.to(dy.dtype))
        if ctx.needs_input_grad[3]:
            both = ctx.needs_input_grad[4] and ctx.same_rows
            dw, db = linear_dw(x, dy, rows, both)
            dw = dw.to(ctx.dtypes[0])
            db = db if both else None
        if ctx.needs_input_grad[4]:
            db = (bias_gradient(dy, bias_rows, -1) if db is None else db).to(ctx.dtypes[1])
        return dx, None, None, dw, db, None, None, None


class SparseLinear(CompactLayer, nn.Linear):
    """Linear layer that trains the selected channels only; arguments, shapes and values of `torch.nn.Linear`.

    A layer made directly is trained whole, like the stock one; `set_channels` (or `sparse_bwd.apply`) selects.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._convert()
        self.set_channels(None, bias="all")

    def _convert(self) -> None:
        self._init_compact()
        for name in ("weight", "bias"):
            parameter = self._parameters[name]
            if parameter is not None:
                parameter.requires_grad_(False)

    weight = property(lambda self: self._read("weight"))
    bias = property(lambda self: self._read("bias"))

    def num_channels(self, axis: str = "out") -> int:
        """Channels on the axis: output features ("out") or input features ("in")."""
        return self.out_features if axis == "out" else self.in_features

    def channel_cost(self, axis: str = "out") -> int:
        """Weights of one channel (its bias is not counted)."""
        return self.in_features if axis == "out" else self.out_features

    def set_channels(
        self, index: Iterable[int] | Tensor | None, axis: str = "out", bias: str = "selected"
    ) -> None:
        """Train the channels `index` (None = all, empty = none) of `axis` from now on.

        Args:
            bias: "selected" (of the selected outputs; axis "out" only), "all" or "none".

        Raises:
            ValueError, TypeError: the index or a word does not fit the layer.
        """
        check_words(axis, bias, "SparseLinear")
        chosen = as_index(index, self.num_channels(axis), f"SparseLinear, axis '{axis}',")
        place_selection(self, chosen, axis, bias, 0 if axis == "out" else 1, 1)

    def forward(self, input: Tensor) -> Tensor:
        self.synchronise()
        weight, bias = self.current("weight"), self.current("bias")
        input = autocast_input(input)
        slot, bias_slot = self._slots.get("weight"), self._slots.get("bias")
        index = None if slot is None else slot.index
        rows = index if self.axis == "out" else None
        bias_rows = None if bias_slot is None else bias_slot.index
        y: Tensor = LinearFunction.apply(
            input, weight, bias, self.trained("weight"), self.trained("bias"),
            index if self.axis == "in" else None, rows,
            # The layer holds one vector where both are equal, so that no values need to be compared.
            "rows" if bias_rows is rows else bias_rows,
        )  # fmt: skip
        return y


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
    """Make the slots of a weight-bearing layer from a checked selection and install them."""
    full = layer._full("weight")
    layer_index = layer.own_index(chosen, full.device)
    # An index of all channels is no gather at all.
    index = None if chosen is not None and chosen.numel() == layer.num_channels(axis) else layer_index
    slots: dict[str, Slot] = {}
    if index is None or index.numel():
        slots["weight"] = Slot(index, dim, groups)
    if layer._parameters["bias"] is not None:
        if bias == "all":
            slots["bias"] = Slot(None, 0, 1)
        elif bias == "selected" and "weight" in slots:
            slots["bias"] = Slot(index, 0, 1)
    layer._place(slots)
    layer._index, layer.axis, layer.bias_mode = layer_index, axis, bias


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes in; the cast stands outside the Function so that autograd undoes it."""
    device = x.device.type
    if device == "meta":  # autocast does not know it
        return x
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
