"""What plain PyTorch does for the same thing as a call of an operator: the denominators of ratios.

    linear_dw, conv2d_dw      the gradient of the whole weight (of a Linear also of its bias), from the whole input
    linear_dw_statistics      the same, and the three statistics of every row from it
    affine_act, affine_act_   batch norm on running statistics into a new tensor, then the activation in place
    affine_act_dx             backward of the activation, then of that batch norm, from what PyTorch keeps
    max_pool2d(_dx)           pooling with int64 indices, and its backward
    norm_affine               the same arithmetic, one PyTorch operator per step (PyTorch's own norm has it inside)
    response                  cosine per sample and channel, in the dtype of the response, and a copy of the new one
    affine_act_response       that, then norm and activation as above
    response_sketch           as response: the measurement that a sketch replaces keeps whole responses
    write_back                one copy per layer

Each maker takes the arguments of a call of the operator, prepares outside the time what PyTorch would have kept from
forward, and returns what is to be timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_bwd.measure.networks import Conv, Linear

Run = Callable[[], object]
aten: Any = torch.ops.aten


def weight_gradient(layer: Conv | Linear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The gradient of the whole weight as PyTorch computes it, with that of a Linear's bias."""
    if isinstance(layer, Linear):
        return dy.t() @ x, dy.sum(0)
    weight = x.new_empty(layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel)
    if x.stride(1) == 1 < x.shape[1]:
        weight = weight.to(memory_format=torch.channels_last)
    _, dw, _ = aten.convolution_backward(
        dy, x, weight, None, [layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], layer.groups,
        [False, True, False],
    )  # fmt: skip
    return (dw,)


def weight_gradient_with_statistics(
    layer: Linear, x: Tensor, dy: Tensor, previous: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """The same with |dw|^2, <dw, previous> and <weight, dw> of every row."""
    dw, db = weight_gradient(layer, x, dy)
    return dw, db, *((dw * other).sum(1) for other in (dw, previous, weight))


def _norm(scale: Tensor | None, shift: Tensor | None) -> Callable[[Tensor], Tensor]:
    if scale is None:
        return torch.clone
    mean, variance = torch.zeros_like(scale), torch.ones_like(scale)
    return lambda x: F.batch_norm(x, mean, variance, scale, shift)


def _activation(act: str, low: float, high: float) -> Callable[[Tensor], Tensor]:
    """In place, as networks have it behind a norm."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda x: x,
        "relu": lambda x: F.relu(x, inplace=True),
        "hardtanh": lambda x: F.hardtanh(x, low, high, inplace=True),
        "leaky_relu": lambda x: F.leaky_relu(x, low, inplace=True),
    }
    return known[act]


def affine_act(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float, *flags: bool
) -> Run:
    norm, activation = _norm(scale, shift), _activation(act, low, high)
    return lambda: activation(norm(x))


def affine_act_dx(
    dy: Tensor, scale: Tensor, mask: Tensor | None, act: str, slope: float, strides: list[int], shift: bool
) -> Run:
    x, y = torch.randn_like(dy), torch.randn_like(dy)
    mean, variance = torch.zeros_like(scale), torch.ones_like(scale)
    backward: dict[str, Callable[[], Tensor]] = {
        "none": lambda: dy,
        "relu": lambda: aten.threshold_backward(dy, y, 0),
        "hardtanh": lambda: aten.hardtanh_backward(dy, y, 0, 6),
        "leaky_relu": lambda: aten.leaky_relu_backward(dy, y, slope, False),
    }
    activation, wanted = backward[act], [True, False, shift]
    return lambda: aten.native_batch_norm_backward(
        activation(), x, scale, mean, variance, None, None, False, 1e-5, wanted
    )


def max_pool2d(x: Tensor, *window: Any) -> Run:
    return partial(aten.max_pool2d_with_indices, x, *window)


def max_pool2d_dx(dy: Tensor, offset: Tensor, shape: Sequence[int], *window: Any) -> Run:
    channels_last = dy.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(shape, device=dy.device, dtype=dy.dtype)
    x = x.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    indices = aten.max_pool2d_with_indices(x, *window)[1]
    return partial(aten.max_pool2d_with_indices_backward, dy, x, *window, indices)


def norm_affine(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(variance + eps) * weight
        return scale, bias - mean * scale

    return run


def _similarity(new: Tensor, previous: Tensor) -> Tensor:
    """Cosine per sample and channel; then the new response is stored."""
    cosine = (new * previous).sum((2, 3))
    norms = [torch.linalg.vector_norm(each, dim=(2, 3)) for each in (new, previous)]
    previous.copy_(new)
    return cosine.div_(norms[0]).div_(norms[1])


def response(new: Tensor, previous: Tensor, channels: Tensor | None) -> Run:
    if channels is None:
        return partial(_similarity, new, previous)
    return lambda: _similarity(new.index_select(1, channels), previous)


def affine_act_response(x: Tensor, previous: Tensor, *rest: Any) -> Run:
    behind = affine_act(x, *rest)
    return lambda: (_similarity(x, previous), behind())


def response_sketch(new: Tensor, sums: Tensor, seed: int, start: int) -> Run:
    return partial(_similarity, new, torch.randn_like(new))


def write_back(
    weights: list[Tensor],
    slices: list[Tensor],
    indices: list[Tensor | None],
    dims: list[int],
    groups: list[int],
) -> Run:
    def run() -> None:
        for full, part, index, dim in zip(weights, slices, indices, dims, strict=True):
            if index is None:
                full.copy_(part)
            else:
                full.index_copy_(dim, index, part)

    return run


MAKERS: dict[str, Callable[..., Run]] = {
    "affine_act": affine_act,
    "affine_act_": affine_act,
    "affine_act_dx": affine_act_dx,
    "affine_act_response": affine_act_response,
    "max_pool2d": max_pool2d,
    "max_pool2d_dx": max_pool2d_dx,
    "norm_affine": norm_affine,
    "response": response,
    "response_sketch": response_sketch,
    "write_back": write_back,
}
