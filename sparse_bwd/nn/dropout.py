"""Dropout that keeps one bit per element instead of a mask in the dtype of x.

    y = x keep / (1 - p)        dx = dy keep / (1 - p)        bytes kept: ceil(Y / 8)

The mask is the one that PyTorch draws in eager mode for the same seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn.first_order import refuse_second_order
from sparse_bwd.ops import bits
from sparse_bwd.ops.layout import dense_strides, flat


class DropoutFunction(torch.autograd.Function):
    """Arguments: x and p."""

    @staticmethod
    def forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        y, keep = torch.native_dropout(x, p, True)
        dense = torch.empty_strided(x.shape, dense_strides(x), dtype=torch.bool, device=x.device).copy_(keep)
        packed = torch.empty(bits.packed_size(x.numel()), dtype=torch.uint8, device=x.device)
        bits.pack(flat(dense), packed)
        return y, packed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, p = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])
        ctx.scale = 0.0 if p == 1 else 1 / (1 - p)
        ctx.strides = dense_strides(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        refuse_second_order("Dropout")
        if dy is None:
            return None, None
        (packed,) = ctx.saved_tensors
        keep = bits.unpack(packed, dy.numel()).as_strided(dy.shape, ctx.strides)
        return torch.ops.aten.native_dropout_backward(dy, keep, ctx.scale), None


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that keeps ceil(Y / 8) bytes; `inplace` copies the result over x."""

    def forward(self, x: Tensor) -> Tensor:
        lean = self.training and self.p > 0 and torch.is_grad_enabled() and x.requires_grad
        if not lean or self.inplace:
            return super().forward(x)
        y: Tensor = DropoutFunction.apply(x, self.p)[0]
        return y
