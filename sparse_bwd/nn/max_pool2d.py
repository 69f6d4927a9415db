"""MaxPool2d that keeps one byte per output (the offset in its window) instead of its input and an int64 index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.ops.max_pool2d import max_pool2d, max_pool2d_dx


class MaxPool2dFunction(Function):
    """Arguments: x [N, C, H, W] and the window (kernel, stride, padding, dilation, ceil_mode)."""

    @staticmethod
    def forward(x: Tensor, window: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        y, offset = max_pool2d(x, *window)
        return y, offset

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.window = inputs
        ctx.save_for_backward(output[1])
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, None]:
        refuse_second_order("MaxPool2d")
        (offset,) = ctx.saved_tensors
        return max_pool2d_dx(dy, offset, ctx.shape, *ctx.window), None


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that keeps Y bytes; stock where indices are returned or a window has over 256 elements."""

    def forward(self, input: Tensor) -> Any:
        kernel, stride, dilation = _pair(self.kernel_size), _pair(self.stride), _pair(self.dilation)
        lean = torch.is_grad_enabled() and input.requires_grad and kernel[0] * kernel[1] <= 256
        if not lean or self.return_indices or input.dim() not in (3, 4) or input.numel() == 0:
            return super().forward(input)
        if input.shape[-2] < dilation[0] or input.shape[-1] < dilation[1]:
            return super().forward(input)  # a window may lie in the padding alone and have no offset
        window = (kernel, stride, _pair(self.padding), dilation, self.ceil_mode)
        batch = input if input.dim() == 4 else input.unsqueeze(0)
        y = MaxPool2dFunction.apply(batch, window)
        return y if input.dim() == 4 else y.squeeze(0)
