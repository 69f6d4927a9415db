"""Activations whose slope is no step function of the input: GELU, SiLU, Hardswish; and Hardsigmoid, with two slopes.

    GELU, SiLU, Hardswish   keep x, e X, as PyTorch: the slope takes every value, and no fewer bits of x give it exactly
    Hardsigmoid             keeps ceil(Y / 8) bytes: the slope is 1/6 or 0

What becomes lean is the output: lean layers that read it make it again from x (`recompute.py`) and keep nothing. A
Hardswish or GELU cannot be undone from its output instead: both have a minimum, near which x is lost to rounding.
In place (SiLU, Hardswish) PyTorch keeps a copy of x, and so do these, without a note on the output; but behind a lean
layer of a Chain (`chain.py`), where nobody else sees x, they work out of place, which takes the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.recompute import note_origin
from sparse_bwd.ops import bits
from sparse_bwd.ops.layout import dense_strides


class SmoothActivation(nn.Module):
    """An activation that keeps its input, and whose output others make again from it."""

    def again(self) -> Callable[[Tensor], Tensor]:
        """The activation as a function of its input alone, out of place."""
        raise TypeError(f"{type(self).__name__} does not say how its output is made again.")

    def forward(self, input: Tensor) -> Tensor:
        if getattr(self, "inplace", False) or not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)  # type: ignore[no-any-return]
        return self.beside(input)

    def beside(self, x: Tensor) -> Tensor:
        """The activation out of place, for callers that know that nobody looks whether x was overwritten."""
        compute = self.again()
        y = compute(x)
        return note_origin(y, compute, x) if torch.is_grad_enabled() and x.requires_grad else y


class GELU(SmoothActivation, nn.GELU):
    """`torch.nn.GELU`, both forms, whose output costs nothing in the lean layers that read it."""

    def again(self) -> Callable[[Tensor], Tensor]:
        return partial(F.gelu, approximate=self.approximate)


class SiLU(SmoothActivation, nn.SiLU):
    """`torch.nn.SiLU` whose output costs nothing in the lean layers that read it."""

    def again(self) -> Callable[[Tensor], Tensor]:
        return F.silu


class Hardswish(SmoothActivation, nn.Hardswish):
    """`torch.nn.Hardswish` whose output costs nothing in the lean layers that read it."""

    def again(self) -> Callable[[Tensor], Tensor]:
        return F.hardswish


class HardsigmoidFunction(Function):
    """Argument: x."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        strides = dense_strides(x)
        inside = torch.empty_strided(x.shape, strides, dtype=torch.bool, device=x.device)
        torch.logical_and(x > -3, x < 3, out=inside)
        packed = torch.empty(bits.packed_size(x.numel()), dtype=torch.uint8, device=x.device)
        bits.pack(inside.as_strided((x.numel(),), (1,)), packed)
        return F.hardsigmoid(x), packed

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.strides = dense_strides(inputs[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Tensor:
        refuse_second_order("Hardsigmoid")
        (packed,) = ctx.saved_tensors
        inside = bits.unpack(packed, dy.numel()).as_strided(dy.shape, ctx.strides)
        return torch.where(inside, dy * (1 / 6), 0.0)


class Hardsigmoid(nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid` that keeps ceil(Y / 8) bytes."""

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace or not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        y: Tensor = HardsigmoidFunction.apply(input)
        return y
