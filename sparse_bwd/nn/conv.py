"""SparseConv2d: a convolution with gradients of the selected channels only.

    dx = conv_transpose2d(dy, W)     when x needs a gradient; keeps W (a Parameter: 0 bytes), no stand-in for x
    dw = conv2d_dw(x, dy)            when channels are selected; keeps the part of x that they read
    db = sum dy                      keeps nothing

Bytes kept: 0 with nothing selected; axis "out": e X, in grouped layers times (touched groups) / groups;
axis "in": e X k / C_in; 8 bytes per index element. A weight gradient costs k / C of dense. An input that is known to be
made from what somebody keeps anyway (`recompute.py`) costs nothing where all of it is read.
Asymmetric and non-zero padding is redone in backward, so that x and not its padded copy is kept.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.affine_act import IDENTITY, Activation, BatchNorm2d, affine_act
from sparse_bwd.nn.conv_block import Step, run_steps
from sparse_bwd.nn.conv_layer import ConvLayer
from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.linear import autocast_input
from sparse_bwd.nn.recompute import Origin, origin_of
from sparse_bwd.ops.conv2d_dw import Plan, conv2d_dw, groups_of, kept_input
from sparse_bwd.ops.conv_chain import DB, DSHIFT, DW, DX, Block, activation_code, geometry_numbers
from sparse_bwd.ops.linear_dw import bias_gradient
from sparse_bwd.ops.padding import Geometry, conv2d_dx, pad


class Conv2dFunction(Function):
    """Arguments: x [N, C_in, H, W], full weight and bias (frozen), compact weight and bias, the index vectors of the
    plan (`ops/conv2d_dw.py`), rows of dy that enter db ("rows": those of the plan, for torch.compile wants no tensor
    twice), the geometry, whether dw is that of input channels in groups, and how x can be made again or None."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor | None,
        part_bias: Tensor | None,
        keep: Tensor | None,
        spread: Tensor | None,
        rows: Tensor | None,
        pick: Tensor | None,
        bias_rows: Tensor | str | None,
        geometry: Geometry,
        regroup: bool,
        origin: Origin | None,
    ) -> Tensor:
        g = geometry
        return F.conv2d(pad(x, g), weight, bias, g.stride, g.inner_padding, g.dilation, g.groups)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        (
            x,
            weight,
            _,
            part,
            part_bias,
            keep,
            spread,
            rows,
            pick,
            bias_rows,
            ctx.geometry,
            ctx.regroup,
            origin,
        ) = inputs
        bias_rows = rows if isinstance(bias_rows, str) else bias_rows
        needs_dx, needs_dw, needs_db = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[3],
            ctx.needs_input_grad[4],
        )
        plan = (spread, rows, pick) if needs_dw else (None, None, None)
        ctx.compute = origin.compute if origin is not None and needs_dw else None
        again = () if ctx.compute is None else (keep, *origin.tensors)
        ctx.save_for_backward(
            kept_input(x, keep) if needs_dw and not again else None, weight if needs_dx else None,
            part if needs_dw else None, *plan, bias_rows if needs_db else None, *again,
        )  # fmt: skip
        ctx.shape = tuple(x.shape[2:])
        ctx.dtypes = [None if p is None else p.dtype for p in (part, part_bias)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("SparseConv2d")
        x, weight, part, spread, rows, pick, bias_rows, *again = ctx.saved_tensors
        g: Geometry = ctx.geometry
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = conv2d_dx(dy, weight.to(dy.dtype), ctx.shape, g)
        if ctx.compute is not None:
            keep, *tensors = again
            x = kept_input(ctx.compute(*tensors), keep)
        if ctx.needs_input_grad[3]:
            dw = conv2d_dw(
                x,
                dy,
                spread,
                rows,
                pick,
                part.shape,
                g.stride,
                g.padding,
                g.padding_mode,
                g.dilation,
                groups_of(x, dy, rows, part.shape, ctx.regroup),
                ctx.regroup,
            ).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            db = bias_gradient(dy, bias_rows, 1).to(ctx.dtypes[1])
        return (dx, None, None, dw, db, *[None] * 8)


class SparseConv2d(ConvLayer, nn.Conv2d):
    """Convolution that trains the selected channels only; arguments, shapes and values of `torch.nn.Conv2d`.

    A layer made directly is trained whole, like the stock one; `set_channels` (or `sparse_bwd.apply`) selects.
    """

    _geometry: Geometry
    _numbers: tuple[int, ...]  # of a block; empty: the native library does not know the geometry or the plan

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._convert()
        self.set_channels(None, bias="all")

    def _convert(self) -> None:
        super()._convert()
        self._geometry, self._numbers = _geometry_of(self), ()

    def _strip_compact(self) -> None:
        super()._strip_compact()
        del self._geometry, self._numbers

    weight = property(lambda self: self._read("weight"))
    bias = property(lambda self: self._read("bias"))

    def _use(self, plan: Plan) -> None:
        super()._use(plan)
        known = plan.spread is None and plan.pick is None and not self._geometry.pads_outside
        served = known and (self.groups == 1 or self.depthwise)
        self._numbers = geometry_numbers(self._geometry, self.kernel_size) if served else ()

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        self.synchronise()
        return run_steps(autocast_input(input), [Step(self, None, None, (self,))])

    def convolve(self, x: Tensor, norm: BatchNorm2d | None, act: Activation | None) -> Tensor:
        """The convolution, and the norm on running statistics and the activation behind it in place."""
        plan, slot = self._plan, self._slots.get("bias")
        bias_rows = None if slot is None else slot.index
        y: Tensor = Conv2dFunction.apply(
            x, self.current("weight"), self.current("bias"),
            self.trained("weight"), self.trained("bias"),
            *plan[:4], "rows" if bias_rows is plan.rows else bias_rows, self._geometry,
            self.axis == "in" and self.groups > 1, origin_of(x),
        )  # fmt: skip
        if norm is not None:
            return norm.affine_act(y, act or IDENTITY, inplace=True)
        return y if act is None else affine_act(y, None, None, act, inplace=True)

    def trained_tensors(self, norm: BatchNorm2d | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The compact weight and bias, and the compact shift of the norm behind."""
        shift = None if norm is None else norm.trained("bias")
        return self.trained("weight"), self.trained("bias"), shift

    def describe(
        self,
        block: Block,
        kept: list[Tensor | None],
        norm: BatchNorm2d | None,
        act: Activation | None,
        wants: int,
    ) -> None:
        """Add this layer, and the norm and activation behind it, to a block and to what its backward reads."""
        own, plan, slot = self._parameters, self._plan, self._slots.get("bias")
        keep = plan.keep if wants & DW else None
        if norm is None:
            block.tensors.extend((own["weight"], own["bias"], keep, None, None, None, None))
            eps, shift_rows = -1.0, None
        else:
            theirs, shift = norm._parameters, norm._slots.get("bias")
            block.tensors.extend((
                own["weight"], own["bias"], keep, norm.running_mean, norm.running_var, theirs["weight"], theirs["bias"],
            ))  # fmt: skip
            eps, shift_rows, act = norm.eps, None if shift is None else shift.index, act or IDENTITY
        block.numbers.extend((*self._numbers, activation_code(act), keep is not None, wants))
        block.values.extend((eps, 0.0, 0.0) if act is None else (eps, act.low, act.high))
        kept += (
            own["weight"] if wants & DX else None, plan.rows if wants & DW else None,
            slot.index if slot is not None and wants & DB else None, shift_rows if wants & DSHIFT else None,
        )  # fmt: skip


def _geometry_of(conv: nn.Conv2d) -> Geometry:
    """Resolve padding words as PyTorch does: "same" puts the odd line of padding at the right and bottom."""
    sides: list[tuple[int, int]] = []
    for i in (1, 0):
        if conv.padding == "same":
            total = conv.dilation[i] * (conv.kernel_size[i] - 1)
            sides.append((total // 2, total - total // 2))
        elif isinstance(conv.padding, str):
            sides.append((0, 0))
        else:
            sides.append((int(conv.padding[i]), int(conv.padding[i])))
    (left, right), (top, bottom) = sides
    stride, dilation = (conv.stride[0], conv.stride[1]), (conv.dilation[0], conv.dilation[1])
    return Geometry(stride, (left, right, top, bottom), conv.padding_mode, dilation, conv.groups)
