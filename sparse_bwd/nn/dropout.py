"""Dropout that keeps one bit per element instead of a mask in the dtype of x.

    y = x keep / (1 - p)        dx = dy keep / (1 - p)        bytes kept: ceil(Y / 8)

The mask is the one that PyTorch draws in eager mode for the same seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.ops import bits
from sparse_bwd.ops.layout import dense_strides, flat


class DropoutFunction(Function):
    """Arguments: x and p."""

    @staticmethod
    def forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        y, keep = torch.native_dropout(x, p, True)
        dense = torch.empty_strided(x.shape, dense_strides(x), dtype=torch.bool, device=x.device).copy_(keep)
        packed = torch.empty(bits.packed_size(x.numel()), dtype=torch.uint8, device=x.device)
        bits.pack(flat(dense), packed)
        return y, packed

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.p = inputs
        ctx.save_for_backward(output[1])
        ctx.strides = dense_strides(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, None]:
        refuse_second_order("Dropout")
        (packed,) = ctx.saved_tensors
        keep = bits.unpack(packed, dy.numel()).as_strided(dy.shape, ctx.strides)
        if dy.is_cpu:  # where PyTorch multiplies by keep / (1 - p), rounded to the dtype first
            return keep.to(dy.dtype).div_(1 - ctx.p).mul_(dy), None
        return torch.ops.aten.native_dropout_backward(dy, keep, 1 / (1 - ctx.p)), None


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` that keeps ceil(Y / 8) bytes; the stock module where p is 0 or 1, which draw nothing."""

    def forward(self, input: Tensor) -> Tensor:
        lean = self.training and 0 < self.p < 1 and torch.is_grad_enabled() and input.requires_grad
        if not lean:
            return super().forward(input)
        y: Tensor = DropoutFunction.apply(input, self.p)
        return input.copy_(y) if self.inplace else y
