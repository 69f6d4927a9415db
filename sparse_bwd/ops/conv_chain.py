"""conv_chain: convolutions that follow one another, each with an affine map and an activation on its output.

    y = act(scale conv2d(x, W) + shift)                     once per layer, in place on the convolution's output
    g = scale act' dy,   dw = conv2d_dw(x, g),   db = sum g,   dshift = sum act' dy,   dx = conv_transpose2d(g, W)

The native library of the CPU runs a whole block of layers in one call, forward and backward. What a small layer costs
beside its arithmetic is then paid once per block, and a gradient between two layers of the block, which nobody else can
read, is overwritten in place. Elsewhere the layers run one by one by the other operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_bwd.ops.affine_act import CODES
from sparse_bwd.ops.backend import direct, native
from sparse_bwd.ops.layout import is_channels_last
from sparse_bwd.ops.padding import Geometry

# What a gradient is asked for.
DW, DB, DSHIFT, DX = 1, 2, 4, 8


class Block(NamedTuple):
    """The layers of a block as the native operators take them (`csrc/cpu/conv_chain.cpp` says how)."""

    numbers: list[int]
    values: list[float]
    tensors: list[Tensor | None]


def serves(x: Tensor) -> bool:
    """Whether the native library may run layers on x as a block, as far as x is concerned."""
    if not direct(x) or x.dim() != 4 or x.numel() == 0 or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return x.is_contiguous() or is_channels_last(x)


def geometry_numbers(geometry: Geometry, kernel: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """What the native operators know of a convolution; `groups` are those of its weight gradient."""
    g = geometry
    return (*g.stride, *g.inner_padding, *g.dilation, *kernel, g.groups, groups)


def activation_code(act: tuple[str, float, float] | None) -> int:
    """The activation behind a convolution, None = nothing at all."""
    return -1 if act is None else CODES[act[0]]


def runs_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a block is computed in channels_last: where its input or first weight is, as by PyTorch."""
    return is_channels_last(x) or is_channels_last(weight)


def conv_chain(x: Tensor, block: Block, channels_last: bool) -> list[Tensor]:
    """y [N, C_out, OH, OW] of the last layer, then what backward needs beside the arguments."""
    result: list[Tensor] = native("conv_chain")(x, block.tensors, block.numbers, block.values, channels_last)
    return result


def conv_chain_dx(
    dy: Tensor,
    tensors: Iterable[Tensor | None],
    made: Iterable[Tensor],
    block: Block,
    size: tuple[int, int],
    channels_last: bool,
) -> list[Tensor]:
    """dx if it is wanted, then per layer dw, db and dshift as far as they are.

    Args:
        tensors: the first layer's input, and per layer the weight and the rows of dw, of db and of dshift.
        made: what `conv_chain` returned after y.
        size: height and width of the first layer's input.
    """
    result: list[Tensor] = native("conv_chain_dx")(
        dy, tensors, made, block.numbers, block.values, size, channels_last
    )
    return result
