"""Padding of convolution inputs, its adjoint, and dx of a convolution without a stand-in for x.

PyTorch's convolution pads symmetrically with zeros by itself. What it cannot (one side more than the other, as in
"same" with an even kernel; reflect, replicate, circular) is padded here in forward and again in backward, so that the
kept tensor stays x itself and not its padded copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bwd.ops.layout import image, is_channels_last, pixels


class Geometry(NamedTuple):
    """How a convolution walks over its input; sizes are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes it
    padding_mode: str
    dilation: tuple[int, int]
    groups: int

    @property
    def inner_padding(self) -> tuple[int, int]:
        """Zero padding that PyTorch's convolution does itself."""
        left, _, top, _ = self.padding
        return (0, 0) if self.pads_outside else (top, left)

    def is_product(self, size: Sequence[int], *tensors: Tensor) -> bool:
        """Whether the convolution with a kernel of `size` is one matrix product over the pixels of these tensors.

        So it is for 1x1 kernels in channels_last. On CPU the product of the gradients is faster than the convolution,
        the more the smaller the image (dw of a tenth of the channels: 1.3 to 4 times).
        """
        plain = self.groups == 1 and self.stride == (1, 1) and not any(self.padding)
        # A list, for torch.compile follows no generator that is left half-way.
        others = [t for t in tensors if not (t.is_cpu and is_channels_last(t))]
        return plain and size[-1] == size[-2] == 1 and not others

    def is_strided_product(self, size: Sequence[int], x: Tensor, dy: Tensor) -> bool:
        """Whether dw of a kernel of `size` is a product over the pixels that its stride reads.

        torch 2.14 corrupts memory on CPU in the weight gradient of such layers in channels_last with few channels.
        """
        plain = self.groups == 1 and not any(self.padding) and size[-1] == size[-2] == 1
        return plain and x.is_cpu and (is_channels_last(x) or is_channels_last(dy))

    @property
    def pads_outside(self) -> bool:
        """Whether the input must be padded before PyTorch's convolution sees it."""
        left, right, top, bottom = self.padding
        return any(self.padding) and (self.padding_mode != "zeros" or left != right or top != bottom)


def pad(x: Tensor, geometry: Geometry) -> Tensor:
    """The input as PyTorch's convolution must see it: x itself, or a padded copy of [N, C, H, W]."""
    if not geometry.pads_outside:
        return x
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, geometry.padding, mode=mode)


def _sources(size: int, before: int, after: int, mode: str) -> list[int]:
    """The position inside 0..size-1 that each padded position outside of it repeats."""
    outside = [*range(-before, 0), *range(size, size + after)]
    if mode == "reflect":
        return [-i if i < 0 else 2 * (size - 1) - i for i in outside]
    if mode == "replicate":
        return [0 if i < 0 else size - 1 for i in outside]
    return [i % size for i in outside]


def _fold(d: Tensor, dim: int, size: int, before: int, after: int, mode: str) -> Tensor:
    """Adjoint of padding one dimension: the inner part, plus each padded line added to the line it repeats."""
    inner = d.narrow(dim, before, size)
    if mode == "zeros" or before + after == 0:
        return inner
    result = inner.clone(memory_format=torch.preserve_format)
    lines = [*range(before), *range(before + size, before + size + after)]
    for line, source in zip(lines, _sources(size, before, after, mode), strict=True):
        result.select(dim, source).add_(d.select(dim, line))
    return result


def unpad(d: Tensor, shape: tuple[int, int], geometry: Geometry) -> Tensor:
    """Adjoint of `pad`: the gradient of [N, C, *shape] from that of the padded tensor. Deterministic on any device."""
    left, right, top, bottom = geometry.padding
    d = _fold(d, 2, shape[0], top, bottom, geometry.padding_mode)
    return _fold(d, 3, shape[1], left, right, geometry.padding_mode)


def conv2d_dx(dy: Tensor, weight: Tensor, shape: tuple[int, int], geometry: Geometry) -> Tensor:
    """dx [N, C_in, *shape] of a convolution from dy and the weight alone: a product or a transposed convolution."""
    if geometry.is_product(weight.shape, dy):
        return image(pixels(dy) @ weight.flatten(1), dy)
    left, right, top, bottom = geometry.padding
    outside = geometry.pads_outside
    padded = (shape[0] + top + bottom, shape[1] + left + right) if outside else shape
    inner, extra = geometry.inner_padding, []
    for i in range(2):
        reach = geometry.dilation[i] * (weight.shape[2 + i] - 1) + 1
        extra.append(padded[i] - ((dy.shape[2 + i] - 1) * geometry.stride[i] - 2 * inner[i] + reach))
    dx = F.conv_transpose2d(
        dy, weight, None, geometry.stride, inner, tuple(extra), geometry.groups, geometry.dilation
    )
    return unpad(dx, shape, geometry) if outside else dx
