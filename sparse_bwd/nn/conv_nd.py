"""Convolutions of one and three dimensions and transposed ones, through PyTorch's own, on gathered slices.

    dx = the adjoint of the convolution on dy     keeps W (a Parameter: 0 bytes)
    dw = weight gradient of the slices            keeps the part of x that they read
    db = sum dy                                   keeps nothing

Bytes kept, as in `conv.py`: 0 with nothing selected; axis "out": e X, with groups times (touched groups) / groups; axis
"in": e X k / C_in; 8 bytes per index element. A weight gradient costs k / C of dense. An input that is made from
what somebody keeps anyway (`recompute.py`) costs nothing. Padding that PyTorch's convolution does not do by itself
(reflect, replicate, circular, uneven "same") is done before: on axis "in" the slices are those of the padded input.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.conv_layer import ConvLayer
from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.index import Move
from sparse_bwd.nn.linear import autocast_input
from sparse_bwd.nn.recompute import Origin, note_origin, origin_of
from sparse_bwd.ops.conv2d_dw import Plan, arranged
from sparse_bwd.ops.linear_dw import bias_gradient


class Walk(NamedTuple):
    """How a convolution walks over its input, in the order of `torch.convolution`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class Sides(NamedTuple):
    """Which slices enter the weight gradient; every index is int64, None = all in order."""

    keep: Tensor | None  # channels of x that are kept for backward
    spread: Tensor | None  # kept channels, repeated so that all groups have as many
    take: Tensor | None  # channels of dy, repeated likewise
    pick: Tensor | None  # results that are not repeats
    groups: int  # groups of the small convolution
    regroup: bool  # whether the result is shaped as input channels of a grouped layer


class ConvNdFunction(Function):
    """Arguments: x [N, C_in, *], full weight and bias (frozen), compact weight and bias, the four index vectors of
    `Sides`, rows of dy that enter db ("take": those of the sides, for torch.compile wants no tensor twice), the walk,
    (groups of the small convolution, regroup), and how x can be made again or None."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor | None,
        part_bias: Tensor | None,
        keep: Tensor | None,
        spread: Tensor | None,
        take: Tensor | None,
        pick: Tensor | None,
        bias_rows: Tensor | str | None,
        walk: Walk,
        small: tuple[int, bool],
        origin: Origin | None,
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return torch.convolution(x, weight.to(x.dtype), bias, *walk)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, part, part_bias, keep, spread, take, pick, bias_rows, ctx.walk, ctx.small, origin = (
            inputs
        )
        bias_rows = take if isinstance(bias_rows, str) else bias_rows
        needs_dx, needs_dw, needs_db = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[3],
            ctx.needs_input_grad[4],
        )
        ctx.compute = origin.compute if origin is not None and needs_dw else None
        again = () if ctx.compute is None else (keep, *origin.tensors)
        kept = (x if keep is None else x.index_select(1, keep)) if needs_dw and not again else None
        plan = (spread, take, pick) if needs_dw else (None, None, None)
        ctx.save_for_backward(
            kept, weight if needs_dx else None, part if needs_dw else None, *plan,
            bias_rows if needs_db else None, *again,
        )  # fmt: skip
        ctx.shape = tuple(x.shape[2:])
        ctx.dtypes = [None if p is None else p.dtype for p in (part, part_bias)]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("A sparse convolution")
        x, weight, part, spread, take, pick, bias_rows, *again = ctx.saved_tensors
        dx = dw = db = None
        if ctx.compute is not None:
            keep, *tensors = again
            x = ctx.compute(*tensors)
            x = x if keep is None else x.index_select(1, keep)
        if ctx.needs_input_grad[3]:
            x = x if spread is None else x.index_select(1, spread)
            taken = dy if take is None else dy.index_select(1, take)
            groups, regroup = ctx.small
            dw = arranged(
                _weight_gradient(x, taken, part.shape[2:], ctx.walk, groups), pick, groups, regroup,
                torch.contiguous_format,
            ).to(ctx.dtypes[0])  # fmt: skip
            del taken
        del x
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(dy, weight.to(dy.dtype), ctx.shape, ctx.walk)
        if ctx.needs_input_grad[4]:
            db = bias_gradient(dy, bias_rows, 1).to(ctx.dtypes[1])
        return (dx, None, None, dw, db, *[None] * 8)


def _weight_gradient(x: Tensor, dy: Tensor, kernel: torch.Size, walk: Walk, groups: int) -> Tensor:
    """dw of the convolution with these groups between the slices x [N, A, *] and dy [N, B, *]."""
    first, second = (x.shape[1], dy.shape[1]) if walk.transposed else (dy.shape[1], x.shape[1])
    like = x.new_empty(first, second // groups, *kernel)
    # Not of channels: in a graph their number may be unknown, and there is at least one.
    if 0 in (*x.shape[:1], *x.shape[2:], *dy.shape[2:]):
        return like.zero_()
    dw: Tensor = torch.ops.aten.convolution_backward(
        dy, x, like, None, *walk[:5], groups, [False, True, False]
    )[1]
    return dw


def _input_gradient(dy: Tensor, weight: Tensor, shape: tuple[int, ...], walk: Walk) -> Tensor:
    """dx [N, C_in, *shape]: the adjoint convolution, which needs no stand-in for x."""
    dims = range(len(shape))
    if walk.transposed:
        zeros = (0,) * len(shape)
        dx = torch.convolution(dy, weight, None, *walk[:3], False, zeros, walk.groups)
        for d in dims:  # an output padding of a stride or more gives places that x does not have
            dx = dx.narrow(2 + d, 0, shape[d])
        return dx
    extra = []
    for d in dims:
        reach = walk.dilation[d] * (weight.shape[2 + d] - 1) + 1
        extra.append(shape[d] - ((dy.shape[2 + d] - 1) * walk.stride[d] - 2 * walk.padding[d] + reach))
    return torch.convolution(dy, weight, None, *walk[:3], True, tuple(extra), walk.groups)


class SlicedConv(ConvLayer):
    """A convolution on gathered slices; `Conv1d`, `Conv3d` and the transposed ones differ in what PyTorch calls them.

    A layer made directly is trained whole, like the stock one; `set_channels` (or `sparse_bwd.apply`) selects.
    """

    _sides: Sides
    _even: (
        tuple[int, ...] | None
    )  # zero padding that PyTorch's convolution does itself; None: `_pad` is before it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._convert()
        self.set_channels(None, bias="all")

    weight = property(lambda self: self._read("weight"))
    bias = property(lambda self: self._read("bias"))

    def _strip_compact(self) -> None:
        super()._strip_compact()
        del self._sides, self._even

    def _convert(self) -> None:
        super()._convert()
        self._sides, self._even = Sides(None, None, None, None, self.groups, False), _even_padding(self)

    def _use(self, plan: Plan) -> None:
        super()._use(plan)
        grouped_in = self.groups > 1 and "weight" in self._slots and self._slots["weight"].dim == 1
        if not self.transposed:
            self._sides = Sides(plan.keep, plan.spread, plan.rows, plan.pick, plan.groups, grouped_in)
            return
        # What the other convolution keeps of its x is what this one takes of dy, and the reverse.
        keep, spread = plan.rows, None
        if keep is not None and plan.pick is not None:
            keep, spread = keep.unique(return_inverse=True)
        take = plan.keep
        if plan.spread is not None:
            take = plan.spread if take is None else take[plan.spread]
        self._sides = Sides(keep, spread, take, plan.pick, plan.groups, grouped_in)

    def _move_index(self, move: Move) -> None:
        super()._move_index(move)
        keep, spread, take, pick, groups, regroup = self._sides
        self._sides = Sides(move(keep), move(spread), move(take), move(pick), groups, regroup)

    def _pad(self, x: Tensor) -> Tensor:
        """x as PyTorch's convolution must see it, with a note how to make it again where all of it would be kept."""
        if self._even is not None:
            return x
        conv: Any = self
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        make = partial(F.pad, pad=conv._reversed_padding_repeated_twice, mode=mode)
        padded = make(x)
        return (
            note_origin(padded, make, x) if self._sides.keep is None and torch.is_grad_enabled() else padded
        )

    def convolve(self, input: Tensor, output_padding: tuple[int, ...]) -> Tensor:
        """The convolution of a batch or a single sample."""
        if not self.is_batched(input):
            return self.convolve(input.unsqueeze(0), output_padding).squeeze(0)
        self.synchronise()
        x = self._pad(autocast_input(input))
        sides, slot = self._sides, self._slots.get("bias")
        bias_rows = None if slot is None else slot.index
        zeros = (0,) * len(self.kernel_size)
        walk = Walk(
            self.stride, zeros if self._even is None else self._even, self.dilation, self.transposed, output_padding,
            self.groups,
        )  # fmt: skip
        y: Tensor = ConvNdFunction.apply(
            x, self.current("weight"), self.current("bias"), self.trained("weight"), self.trained("bias"),
            *sides[:4], "take" if bias_rows is sides.take else bias_rows, walk, sides[4:], origin_of(x),
        )  # fmt: skip
        return y


class SparseConv1d(SlicedConv, nn.Conv1d):
    """`torch.nn.Conv1d` that trains the selected channels only."""

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, (0,))


class SparseConv3d(SlicedConv, nn.Conv3d):
    """`torch.nn.Conv3d` that trains the selected channels only."""

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, (0, 0, 0))


class _Transposed(SlicedConv):
    any_length = False  # no graph follows the weight gradient with numbers of channels that it does not know

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        conv: Any = self
        extra = conv._output_padding(
            input,
            output_size,
            self.stride,
            conv.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        return self.convolve(input, tuple(extra))


class SparseConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that trains the selected channels only.

    The weight is [C_in, C_out/g, kw]; the compact weight is [C_in, k, kw] on axis "out" ([k, C_in/g, kw] with groups),
    [k, C_out/g, kw] on axis "in".
    """


class SparseConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that trains the selected channels only; shapes as of `SparseConvTranspose1d`."""


class SparseConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that trains the selected channels only; shapes as of `SparseConvTranspose1d`."""


def _even_padding(conv: Any) -> tuple[int, ...] | None:
    """The padding if it is of zeros and the same on both sides, else None."""
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    if conv.padding_mode != "zeros":
        return None
    if conv.padding != "same":
        return tuple(conv.padding)
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
