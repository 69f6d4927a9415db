"""Norms over the features of a token: LayerNorm and RMSNorm.

    LayerNorm   y = (x - mean) rstd w + b      d(shift) = sum dy, for the trained shifts
    RMSNorm     y = x rstd w                   dx = rstd g - x rstd^3 <g, x> / F, g = w dy       dw = sum dy x rstd

Bytes kept, with F features and R = X / F rows: LayerNorm e X + 8 R, as PyTorch; RMSNorm e X, where PyTorch keeps up to
8 X + 4 R. With nothing trainable before it, a norm of which at most the shift is trained keeps nothing at all.
y is made again from x in backward by the lean layers that read it (`recompute.py`), so that x and y together cost e X.

To keep y instead and take (y - b) / w for the normalised x would cost the same, but needs a scale that is nowhere near
zero: the error grows as |b / w|. Making y from x asks nothing of the scale and gives the same bits in every mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.norm import ShiftedNorm
from sparse_bwd.nn.recompute import note_origin
from sparse_bwd.ops.linear_dw import bias_gradient


class LayerNormFunction(Function):
    """Arguments: x, scale and shift (frozen), compact shift and its channels or None, eps."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor, part: Tensor, rows: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = torch.native_layer_norm(x, bias.shape, weight, bias, eps)
        return y, mean, rstd

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, part, rows, _ = inputs
        needs_dx, needs_db = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        for_dx = (x, *output[1:], weight) if needs_dx else (None,) * 4
        ctx.save_for_backward(*for_dx, part if needs_db else None, rows if needs_db else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("A LayerNorm of which the shift is trained")
        x, mean, rstd, weight, part, rows = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            shape, mask = x.shape[-1:], [True, False, False]
            dx = torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, None, mask)[0]
        if ctx.needs_input_grad[3]:
            db = bias_gradient(dy, rows, -1).to(part.dtype)
        return dx, None, None, db, None, None


class RMSNormFunction(Function):
    """Arguments: x, scale or None, eps, and forward as a function of x and scale."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float, compute: Callable[..., Tensor]) -> Tensor:
        return compute(x, weight)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("RMSNorm")
        x, weight = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        features = x.shape[-1]
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(features)
        rstd = mean_square.add_(ctx.eps).rsqrt_()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            g = dy.to(wide.dtype) * (1 if weight is None else weight)
            along = (g.unsqueeze(-2) @ wide.unsqueeze(-1)).squeeze(-1)
            dx = g.mul_(rstd).addcmul_(wide, along.mul_(rstd.pow(3)), value=-1 / features).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (wide * rstd).mul_(dy).reshape(-1, features).sum(0).to(weight.dtype)
        return dx, dw, None, None


class LayerNorm(ShiftedNorm, nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, in the modes of `ShiftedNorm`; keeps e X and two numbers per row.

    A norm made directly starts in mode "train", which is the stock layer. Lean layers that read the output keep none.
    """

    def __init__(self, *args: Any, mode: str = "train", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"sparse_bwd's LayerNorm normalises the last axis; normalized_shape {tuple(self.normalized_shape)} "
                "has several: use torch.nn.LayerNorm."
            )
        self._convert(mode)

    weight = property(lambda self: self._read("weight"))
    bias = property(lambda self: self._read("bias"))

    def num_channels(self, axis: str = "out") -> int:
        """Features, on either axis."""
        return int(self.normalized_shape[0])

    def forward(self, input: Tensor) -> Tensor:
        self.synchronise()
        x = _autocast_norm_input(input)
        weight, bias, slot = self._parameters["weight"], self.current("bias"), self._slots.get("bias")
        if slot is None:
            y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        else:
            part = self.trained("bias")
            y = LayerNormFunction.apply(x, weight, bias, part, slot.index, self.eps)
        return _with_origin(y, partial(_layer_norm, self.eps), x, weight, bias)


class RMSNorm(ShiftedNorm, nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis, in the modes of `ShiftedNorm`; keeps e X. It has no shift.

    A norm made directly starts in mode "train", in which its scale is trained.
    """

    def __init__(self, *args: Any, mode: str = "train", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"sparse_bwd's RMSNorm normalises the last axis; normalized_shape {tuple(self.normalized_shape)} "
                "has several: use torch.nn.RMSNorm."
            )
        self._convert(mode)

    def num_channels(self, axis: str = "out") -> int:
        """Features, on either axis."""
        return int(self.normalized_shape[0])

    def forward(self, input: Tensor) -> Tensor:
        # Without one, PyTorch takes that of the dtype in which it adds up.
        wide = torch.promote_types(input.dtype, torch.float32)
        eps = torch.finfo(wide).eps if self.eps is None else float(self.eps)
        return rms_norm(
            _autocast_norm_input(input), self._parameters["weight"], eps, partial(_rms_norm, self.eps)
        )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, compute: Callable[..., Tensor]) -> Tensor:
    """y = compute(x, weight), an RMSNorm over the last axis with this eps, that keeps x alone for backward."""
    if not torch.is_grad_enabled() or not (x.requires_grad or (weight is not None and weight.requires_grad)):
        return compute(x, weight)
    y: Tensor = RMSNormFunction.apply(x, weight, eps, compute)
    return _with_origin(y, compute, x, weight)


def _layer_norm(eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)[0]
    return y


def _rms_norm(eps: float | None, x: Tensor, weight: Tensor | None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _with_origin(y: Tensor, compute: Callable[..., Tensor], x: Tensor, *affine: Tensor | None) -> Tensor:
    """Note how y can be made from x, if x is kept for backward."""
    keeps = x.requires_grad or (affine[0] is not None and affine[0].requires_grad)
    return note_origin(y, compute, x, *affine) if torch.is_grad_enabled() and keeps else y


def _autocast_norm_input(x: Tensor) -> Tensor:
    """x as autocast gives it to a norm: in float32 on CUDA, as it is on the CPU."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.float16, torch.bfloat16):
        return x.float()  # pragma: no cover -- needs CUDA
    return x
