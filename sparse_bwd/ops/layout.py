"""Storage order of tensors: flat views, channel planes and gathers that keep channels_last, none of which copies x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides cover a block of memory without gaps or overlaps, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((st, s) for s, st in zip(shape, strides, strict=True) if s != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of `torch.empty_like(x)`: those of x where x is dense, else x's order of dimensions without gaps."""
    return torch.empty_like(x, device="meta").stride()


def flat(x: Tensor) -> Tensor:
    """x as a 1-d view in storage order; x must be dense."""
    return x.as_strided((x.numel(),), (1,))


def is_channels_last(x: Tensor) -> bool:
    """Whether channels are the fastest dimension of the 4-d tensor x (and NCHW order does not hold as well)."""
    if x.dim() == 4 and isinstance(x.shape[1], torch.SymInt):
        # Chosen channels under torch.compile, as `take_channels` made them: their number, unknown, cannot be compared.
        return bool(x.stride(1) == 1 and x.shape[2] * x.shape[3] != 1)
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def pixels(x: Tensor) -> Tensor:
    """The 2-d view [N H W, C] of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def image(pixels: Tensor, like: Tensor) -> Tensor:
    """The channels_last view [N, C, H, W] of [N H W, C], with N, H and W of `like`; inverse of `pixels`."""
    n, _, h, w = like.shape
    return pixels.view(n, h, w, pixels.shape[1]).permute(0, 3, 1, 2)


def take_channels(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index] of a 4-d tensor as a new tensor in the memory format of x.

    In channels_last the gather runs over a 2-d view, whose kernel is about ten times as fast on CPU as the 4-d one.
    """
    if is_channels_last(x):
        return image(pixels(x).index_select(1, index), x)
    return x.index_select(1, index)
