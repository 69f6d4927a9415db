"""Frozen batch norm and activation as one Function, and the modules around it: BatchNorm2d, ReLU, ReLU6, ...

    y = act(a x + b)        dx = a act'(.) dy        d(shift) = sum of act'(.) dy, for the trained shifts

Bytes kept: ceil(Y / 8) of flags where there is an activation, the vector a where there is a norm; never x or y.
Forward and backward each read and write one tensor; in place, forward allocates the flags alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_bwd.nn.function import Function, refuse_second_order
from sparse_bwd.nn.norm import ShiftedNorm, check_mode
from sparse_bwd.ops import affine_act as operators
from sparse_bwd.ops.layout import dense_strides, is_channels_last
from sparse_bwd.ops.norm_affine import norm_affine


class Activation(NamedTuple):
    """An activation as the operator knows it; low is the slope of leaky_relu."""

    kind: str
    low: float = 0.0
    high: float = 0.0


IDENTITY = Activation("none")
_RELU, _RELU6 = Activation("relu"), Activation("hardtanh", 0.0, 6.0)


class AffineActFunction(Function):
    """Arguments: x, scale and shift [C] or None, compact shift and its channels or None, activation, in place."""

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        part_shift: Tensor | None,
        shift_rows: Tensor | None,
        act: Activation,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        # Whether the flags are needed is known to setup_context alone, so they are always made here;
        # callers take this path only where a gradient is needed.
        arguments = (scale, shift, act.kind, act.low, act.high, True)
        if inplace:
            return x, operators.affine_act_(x, *arguments)
        y, mask = operators.affine_act(x, *arguments)
        return y, mask

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, scale, _, part_shift, shift_rows, ctx.act, inplace = inputs
        y, mask = output
        if inplace:
            ctx.mark_dirty(x)
        needs_dx, needs_dshift = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.save_for_backward(
            scale if needs_dx else None,
            mask if ctx.act.kind != "none" else None,
            part_shift if needs_dshift else None,
            shift_rows if needs_dshift else None,
        )
        ctx.strides = y.stride() if y.is_contiguous() or is_channels_last(y) else dense_strides(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_order("A frozen norm or a lean activation")
        scale, mask, part_shift, shift_rows = ctx.saved_tensors
        needs_dshift = ctx.needs_input_grad[3]
        dx, dshift = operators.affine_act_dx(
            dy, scale, mask, ctx.act.kind, ctx.act.low, ctx.strides, needs_dshift
        )
        if needs_dshift:
            dshift = (dshift if shift_rows is None else dshift.index_select(0, shift_rows)).to(
                part_shift.dtype
            )
        return (
            dx if ctx.needs_input_grad[0] else None,
            None,
            None,
            dshift if needs_dshift else None,
            None,
            None,
            None,
        )


def affine_act(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: Activation,
    inplace: bool,
    part_shift: Tensor | None = None,
    shift_rows: Tensor | None = None,
) -> Tensor:
    """act(scale x + shift) per channel of x [N, C, *], keeping one bit per element and `scale` for backward.

    Args:
        scale, shift: [C], both or neither.
        inplace: overwrite x; the caller knows that nobody else reads it.
        part_shift, shift_rows: the compact shift that gets a gradient and its channels (None = all).
    """
    shift_trained = part_shift is not None and part_shift.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or shift_trained):
        # Autograd lets a Function with two results overwrite no view, so a view gets its values by a copy. So does any
        # tensor under torch.compile, which cannot ask and makes no copy of it.
        view = inplace and (torch.compiler.is_compiling() or x._is_view())
        y: Tensor = AffineActFunction.apply(
            x, scale, shift, part_shift, shift_rows, act, inplace and not view
        )
        return x.copy_(y) if view else y
    arguments = (scale, shift, act.kind, act.low, act.high, False)
    if inplace:
        operators.affine_act_(x, *arguments)
        return x
    return operators.affine_act(x, *arguments)[0]  # type: ignore[no-any-return]


class LeanActivation(nn.Module):
    """An activation that keeps one bit per element for backward; values, NaN and `inplace` as the stock module's."""

    inplace: bool

    @property
    def activation(self) -> Activation:
        raise TypeError(f"{type(self).__name__} names no activation.")

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return affine_act(input, None, None, self.activation, self.inplace)
        return super().forward(input)  # type: ignore[no-any-return]


class ReLU(LeanActivation, nn.ReLU):
    """`torch.nn.ReLU` that keeps ceil(Y / 8) bytes."""

    @property
    def activation(self) -> Activation:
        return _RELU


class Hardtanh(LeanActivation, nn.Hardtanh):
    """`torch.nn.Hardtanh` that keeps ceil(Y / 8) bytes."""

    @property
    def activation(self) -> Activation:
        return Activation("hardtanh", float(self.min_val), float(self.max_val))


class ReLU6(LeanActivation, nn.ReLU6):
    """`torch.nn.ReLU6` that keeps ceil(Y / 8) bytes."""

    @property
    def activation(self) -> Activation:
        return _RELU6


class LeakyReLU(LeanActivation, nn.LeakyReLU):
    """`torch.nn.LeakyReLU` that keeps ceil(Y / 8) bytes."""

    @property
    def activation(self) -> Activation:
        return Activation("leaky_relu", float(self.negative_slope))


class BatchNorm2d(ShiftedNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` in one of three modes, which `model.train()` does not change.

    - "frozen": running statistics; trains nothing, or the shift of selected channels; keeps the scale, [C].
    - "bias": running statistics; trains the shift, of all or of selected channels; keeps the scale, [C].
    - "train": statistics of the batch while training; trains and keeps what PyTorch's does: x and two vectors.

    A norm made directly starts in mode "train", which is the stock layer.
    """

    def __init__(self, *args: Any, mode: str = "train", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._convert(mode)

    weight = property(lambda self: self._read("weight"))
    bias = property(lambda self: self._read("bias"))

    def set_mode(self, mode: str) -> None:
        """Change the mode, as `ShiftedNorm` says.

        Raises:
            ValueError: an unknown mode, or a mode on running statistics for a norm that has none.
        """
        if mode != "train" and self.running_mean is None:
            check_mode(mode)
            raise ValueError(
                f"This BatchNorm2d has no running statistics, so mode '{mode}' cannot normalise; use 'train'."
            )
        super().set_mode(mode)

    def num_channels(self, axis: str = "out") -> int:
        """Channels, on either axis."""
        return self.num_features

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, [C] each in float32 or float64, of the norm on its running statistics."""
        self.synchronise()
        assert self.running_mean is not None and self.running_var is not None
        weight, bias = self._parameters["weight"], self.current("bias")
        with torch.no_grad():
            pair: tuple[Tensor, Tensor] = norm_affine(
                self.running_mean, self.running_var, weight, bias, self.eps
            )
        return pair

    @property
    def on_running_statistics(self) -> bool:
        """Whether forward is a per-channel affine map (modes "frozen" and "bias")."""
        return self.mode != "train"

    def affine_act(self, x: Tensor, act: Activation, inplace: bool) -> Tensor:
        """The norm followed by an activation in one pass; only where `on_running_statistics`."""
        self._check_input_dim(x)
        if x.shape[1] != self.num_features:
            raise RuntimeError(f"This BatchNorm2d has {self.num_features} channels, its input {x.shape[1]}.")
        scale, shift = self.coefficients()
        slot = self._slots.get("bias")
        rows = None if slot is None else slot.index
        return affine_act(x, scale, shift, act, inplace, self.trained("bias"), rows)

    def forward(self, input: Tensor) -> Tensor:
        if not self.on_running_statistics:
            return super().forward(input)
        return self.affine_act(input, IDENTITY, inplace=False)


def activation_of(module: nn.Module) -> Activation | None:
    """The activation of a lean activation module; None for any other module."""
    return module.activation if isinstance(module, LeanActivation) else None


__all__ = [
    "IDENTITY", "Activation", "BatchNorm2d", "Hardtanh", "LeakyReLU", "ReLU", "ReLU6", "activation_of",
    "affine_act",
]  # fmt: skip
