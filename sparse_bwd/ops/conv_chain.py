"""conv_chain: convolutions that follow one another, each with an affine map and an activation on its output.

    y = act(scale conv2d(x, W) + shift)                     once per layer, in place on the convolution's output
    g = scale act' dy,   dw = conv2d_dw(x, g),   db = sum g,   dshift = sum act' dy,   dx = conv_transpose2d(g, W)

The native library of the CPU runs a whole block of layers in one call, forward and backward. What a small layer costs
beside its arithmetic is then paid once per block, and a gradient between two layers of the block, which nobody else can
read, is overwritten in place. Elsewhere the layers run one by one by the other operators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_bwd.ops.affine_act import CODES
from sparse_bwd.ops.backend import NATIVE, direct, missing, native, simulates, traced
from sparse_bwd.ops.bits import packed_size
from sparse_bwd.ops.layout import is_channels_last
from sparse_bwd.ops.padding import Geometry

# What a gradient is asked for.
DW, DB, DSHIFT, DX = 1, 2, 4, 8
_NUMBERS = 12  # of a layer: geometry, groups, activation, whether channels are chosen, what is wanted


class Block(NamedTuple):
    """The layers of a block as the native operators take them (`csrc/cpu/conv_chain.cpp` says how)."""

    numbers: list[int]
    values: list[float]
    tensors: list[Tensor | None]


def serves(x: Tensor) -> bool:
    """Whether the native library may run layers on x as a block, as far as x is concerned."""
    if (
        not (direct(x) or simulates(x) or traced(x))
        or x.dim() != 4
        or x.numel() == 0
        or x.dtype not in (torch.float32, torch.bfloat16)
    ):
        return False
    return x.is_contiguous() or is_channels_last(x)


def geometry_numbers(geometry: Geometry, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """What the native operators know of a convolution."""
    g = geometry
    return (*g.stride, *g.inner_padding, *g.dilation, *kernel, g.groups)


def activation_code(act: tuple[str, float, float] | None) -> int:
    """The activation behind a convolution, None = nothing at all."""
    return -1 if act is None else CODES[act[0]]


def runs_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a block is computed in channels_last: where its input or first weight is, as by PyTorch."""
    return is_channels_last(x) or is_channels_last(weight)


def conv_chain(x: Tensor, block: Block, channels_last: bool) -> list[Tensor]:
    """y [N, C_out, OH, OW] of the last layer, then what backward needs beside the arguments."""
    result: list[Tensor] = _forward(x, block.tensors, block.numbers, block.values, channels_last)
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
    result: list[Tensor] = _backward(dy, tensors, made, block.numbers, block.values, size, channels_last)
    return result


class _Layer(NamedTuple):
    """One layer of the flat lists."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    kernel: list[int]
    depthwise: bool
    flags: bool
    keeps: bool  # whether not all channels of the input are kept
    wants: int

    def output_size(self, size: Sequence[int]) -> list[int]:
        """Height and width of the result."""
        return [
            (size[d] + 2 * self.padding[d] - self.dilation[d] * (self.kernel[d] - 1) - 1) // self.stride[d]
            + 1
            for d in range(2)
        ]


def _layers(numbers: list[int]) -> Iterator[_Layer]:
    for start in range(0, len(numbers), _NUMBERS):
        n = numbers[start : start + _NUMBERS]
        flags = n[11] != 0 and n[9] > 0
        yield _Layer(n[0:2], n[2:4], n[4:6], n[6:8], n[8] > 1, flags, bool(n[10]), n[11])


def _image(like: Tensor, size: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=layout)


def _fake(x, tensors, numbers, values, channels_last):  # type: ignore[no-untyped-def]
    results = []
    for i, layer in enumerate(_layers(numbers)):
        weight, _, keep, mean = tensors[7 * i : 7 * i + 4]
        if layer.wants & DW and keep is not None:
            last = is_channels_last(x)
            results.append(_image(x, (x.shape[0], keep.numel(), *x.shape[2:]), last))
        elif layer.wants & DW and i > 0:
            results.append(x)
        x = _image(x, (x.shape[0], weight.shape[0], *layer.output_size(x.shape[2:])), channels_last)
        if layer.flags:
            results.append(x.new_empty(packed_size(x.numel()), dtype=torch.uint8))
        if mean is not None and layer.wants & ~DSHIFT:
            results.append(x.new_empty(x.shape[1], dtype=torch.float32))
    return [x, *results]


def _fake_dx(dy, tensors, made, numbers, values, size, channels_last):  # type: ignore[no-untyped-def]
    layers, sizes, results = list(_layers(numbers)), [size], []
    for layer in layers:
        sizes.append(layer.output_size(sizes[-1]))
    left, channels = list(made), dy.shape[1]
    for i in reversed(range(len(layers))):
        layer, (weight, *rows) = layers[i], tensors[1 + 4 * i : 5 + 4 * i]
        dw, db, dshift = (channels if index is None else index.numel() for index in rows)
        if values[3 * i] >= 0 and layer.wants & ~DSHIFT:
            left.pop()
        if layer.flags:
            left.pop()
        if layer.wants & DSHIFT:
            results.append(dy.new_empty(dshift, dtype=torch.float32))
        if layer.wants & DB:
            results.append(dy.new_empty(db))
        if layer.wants & DW:
            kept = left.pop() if layer.keeps or i > 0 else tensors[0]
            width = 1 if layer.depthwise else kept.shape[1]
            results.append(_image(dy, (dw, width, *layer.kernel), channels_last))
        if not layer.wants & DX:
            break
        channels = weight.shape[1] * (weight.shape[0] if layer.depthwise else 1)
        if i == 0:
            results.append(_image(dy, (dy.shape[0], channels, *size), channels_last))
    return results[::-1]


if not missing("cpu"):
    # Once, for torch.compile follows no cache.
    _forward, _backward = native("conv_chain"), native("conv_chain_dx")
    torch.library.register_fake(f"{NATIVE}::conv_chain", _fake)
    torch.library.register_fake(f"{NATIVE}::conv_chain_dx", _fake_dx)
