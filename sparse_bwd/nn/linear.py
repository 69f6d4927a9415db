"""SparseLinear: y = x W^T + b, with gradients of the selected channels only.

    dx = dy W                  when x needs a gradient; keeps W (a Parameter: 0 bytes)
    dw = linear_dw(x, dy)      when channels are selected; keeps x (axis "out") or x[..., selected] (axis "in")
    db = sum dy                keeps nothing

Bytes kept: 0 with nothing selected; e X on axis "out"; e X k / C_in on axis "in"; 8 k for the index. Where x is known
to be made from what somebody keeps anyway (`recompute.py`), it is made again in backward and costs nothing on any axis.
Extra multiplications: none; a weight gradient costs k / C of dense.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.index import as_index
from sparse_bwd.nn.recompute import Origin, carry_origin, origin_of
from sparse_bwd.nn.sparse_layer import SparseLayer, check_words, place_selection
from sparse_bwd.ops.linear_dw import bias_gradient, linear_dw


class LinearFunction(Function):
    """Arguments: x, full weight and bias (frozen), compact weight and bias, columns of x to keep (axis "in") or None,
    rows of dy that enter dw (axis "out") or None, rows of dy that enter db ("rows": the same; torch.compile wants no
    tensor twice) or None, how x can be made again or None."""

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
        origin: Origin | None,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        # Beyond two dimensions PyTorch returns a view, which nobody might overwrite once a Function has returned it.
        result: Tensor = y if y.dim() == 2 else torch.ops.aten._unsafe_view(y, y.shape)
        return result

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, part, part_bias, keep, rows, bias_rows, origin = inputs
        ctx.same_rows = isinstance(bias_rows, str)
        bias_rows = rows if ctx.same_rows else bias_rows
        needs_dx, needs_dw, needs_db = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[3],
            ctx.needs_input_grad[4],
        )
        ctx.compute = origin.compute if origin is not None and needs_dw else None
        again = () if ctx.compute is None else (keep, *origin.tensors)
        kept = (x if keep is None else x.index_select(-1, keep)) if needs_dw and not again else None
        ctx.save_for_backward(
            kept, weight if needs_dx else None, part if needs_dw else None, rows if needs_dw else None,
            bias_rows if needs_db else None, *again,
        )  # fmt: skip
        ctx.dtypes = [None if p is None else p.dtype for p in (part, part_bias)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("SparseLinear")
        x, weight, _, rows, bias_rows, *again = ctx.saved_tensors
        dx = dw = db = None
        if ctx.compute is not None:
            keep, *tensors = again
            x = ctx.compute(*tensors)
            x = x if keep is None else x.index_select(-1, keep)
        if ctx.needs_input_grad[3]:
            both = ctx.needs_input_grad[4] and ctx.same_rows
            dw, db = linear_dw(x, dy, rows, both)
            dw = dw.to(ctx.dtypes[0])
            db = db if both else None
        del x  # what was made again ends before dx begins
        if ctx.needs_input_grad[0]:
            dx = dy.matmul(weight.to(dy.dtype))
        if ctx.needs_input_grad[4]:
            db = (bias_gradient(dy, bias_rows, -1) if db is None else db).to(ctx.dtypes[1])
        return dx, None, None, dw, db, *[None] * 4


class FeatureLayer(SparseLayer):
    """A product over the last axis of its input, whatever the layout of its weight."""

    dims: ClassVar[dict[str, int]] = {"out": 0, "in": 1}  # where the channels of an axis lie in the weight

    def channel_cost(self, axis: str = "out") -> int:
        """Weights of one channel (its bias is not counted)."""
        return self.num_channels("in" if axis == "out" else "out")

    def set_channels(
        self, index: Iterable[int] | Tensor | None, axis: str = "out", bias: str = "selected"
    ) -> None:
        """Train the channels `index` (None = all, empty = none) of `axis` from now on.

        Args:
            bias: "selected" (of the selected outputs; axis "out" only), "all" or "none".

        Raises:
            ValueError, TypeError: the index or a word does not fit the layer.
        """
        kind = type(self).__name__
        check_words(axis, bias, kind)
        chosen = as_index(index, self.num_channels(axis), f"{kind}, axis '{axis}',")
        place_selection(self, chosen, axis, bias, self.dims[axis], 1)

    def by_channel(self, values: Tensor) -> Tensor:
        """[B, *, F] becomes [B, F, *].

        With [B, F] or [F] a sample would have one number per feature, whose cosine is only a sign, so the vector runs
        over the batch: [1, F, B].
        """
        if values.dim() <= 2:
            return values.reshape(-1, values.shape[-1]).t().unsqueeze(0)
        return values.movedim(-1, 1)

    def is_batched(self, values: Tensor) -> bool:
        return values.dim() > 1

    def product(self, x: Tensor, weight: Tensor | None, part: Tensor | None) -> Tensor:
        """x weight^T + bias; weight [C_out, C_in] and part [k, C_in] or [C_out, k] are the full and compact weight."""
        x = autocast_input(x)
        slot, bias_slot = self._slots.get("weight"), self._slots.get("bias")
        index = None if slot is None else slot.index
        rows = index if self.axis == "out" else None
        bias_rows = None if bias_slot is None else bias_slot.index
        y: Tensor = LinearFunction.apply(
            x, weight, self.current("bias"), part, self.trained("bias"),
            index if self.axis == "in" else None, rows,
            # The layer holds one vector where both are equal, so that no values need to be compared.
            "rows" if bias_rows is rows else bias_rows, origin_of(x),
        )  # fmt: skip
        return y


class SparseLinear(FeatureLayer, nn.Linear):
    """Linear layer that trains the selected channels only; arguments, shapes and values of `torch.nn.Linear`.

    A layer made directly is trained whole, like the stock one; `set_channels` (or `sparse_bwd.apply`) selects.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._convert()
        self.set_channels(None, bias="all")

    weight = property(lambda self: self._read("weight"))
    bias = property(lambda self: self._read("bias"))

    def num_channels(self, axis: str = "out") -> int:
        """Channels on the axis: output features ("out") or input features ("in")."""
        return self.out_features if axis == "out" else self.in_features

    def forward(self, input: Tensor) -> Tensor:
        self.synchronise()
        return self.product(input, self.current("weight"), self.trained("weight"))


class TransposedLinear(FeatureLayer):
    """A linear layer whose weight is [C_in, C_out], with `nx` inputs and `nf` outputs: the Conv1D of transformers.

    On axis "out" the compact weight is [C_in, k], on "in" [k, C_out].
    """

    dims: ClassVar[dict[str, int]] = {"out": 1, "in": 0}
    nx: int
    nf: int
    weight = property(lambda self: self._read("weight"))
    bias = property(lambda self: self._read("bias"))

    def num_channels(self, axis: str = "out") -> int:
        """Channels on the axis: output features ("out") or input features ("in")."""
        return self.nf if axis == "out" else self.nx

    def as_rows(self, values: Tensor) -> Tensor:
        """The transposed view, [C_out, C_in]."""
        return values.t()

    def forward(self, x: Tensor) -> Tensor:
        self.synchronise()
        weight, part = self.current("weight"), self.trained("weight")
        assert weight is not None
        return self.product(x, weight.t(), None if part is None else part.t())


def autocast_input(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes in; the cast stands outside the Function so that autograd undoes it."""
    device = x.device.type
    if device == "meta":  # autocast does not know it
        return x
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return carry_origin(x, x.to(torch.get_autocast_dtype(device)))
    return x
