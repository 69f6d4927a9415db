"""norm_affine: a batch norm on its running statistics as one multiplication and one addition per channel.

    scale = weight / sqrt(variance + eps)        shift = bias - mean scale        each [C], in float32 at least

In float32 at least, as PyTorch's own: a half-precision variance loses the difference that eps makes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bwd.ops.backend import native, register


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def norm_affine_plain(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(variance.to(_wide(variance)) + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def norm_affine_native(
    mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    for vector in (mean, variance, weight, bias):
        if vector is not None and not (vector.dtype is torch.float32 and vector.is_contiguous()):
            return NotImplemented
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    native("norm_affine")(scale, shift, mean, variance, weight, bias, eps)
    return scale, shift


def _fake(mean, variance, weight, bias, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(mean, dtype=_wide(variance)), torch.empty_like(mean, dtype=_wide(variance))


norm_affine = register(
    "norm_affine(Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    norm_affine_plain,
    _fake,
    norm_affine_native,
    devices=("cpu",),
)
