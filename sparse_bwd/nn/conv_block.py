"""Blocks: convolutions that follow one another, with the norms and activations behind them, as one Function.

The contract is that of the layers one by one (`nn/conv.py`, `nn/affine_act.py`), and so are the bytes kept; values and
gradients between the layers of a block exist only while it runs. Only the native library of the CPU runs blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_bwd.nn import ranges
from sparse_bwd.nn.affine_act import Activation, BatchNorm2d
from sparse_bwd.nn.function import refuse_second_order
from sparse_bwd.nn.recompute import Origin, origin_of
from sparse_bwd.ops.conv_chain import (
    DB,
    DSHIFT,
    DW,
    DX,
    Block,
    conv_chain,
    conv_chain_dx,
    runs_channels_last,
    serves,
)  # fmt: skip
from sparse_bwd.ops.layout import is_channels_last

if TYPE_CHECKING:
    from sparse_bwd.nn.conv import SparseConv2d


class Step(NamedTuple):
    """A convolution, and what its output passes in place: a norm on running statistics, an activation.

    `layers` are the modules that it stands for.
    """

    conv: SparseConv2d
    norm: BatchNorm2d | None
    act: Activation | None
    layers: Sequence[nn.Module]


class ConvBlockFunction(torch.autograd.Function):
    """Arguments: x, the block, the tensors that backward reads (`ops/conv_chain.py`; the first is x where it is kept
    whole), how x can be made again where it is not kept although it is read, whether the block runs in channels_last,
    and three trained tensors per layer: weight, bias, shift."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        kept: list[Tensor | None],
        origin: Origin | None,
        channels_last: bool,
        *trained: Tensor | None,
    ) -> Tensor:
        y, *made = conv_chain(x, block, channels_last)
        ctx.compute = None if origin is None else origin.compute
        again = () if origin is None else origin.tensors
        ctx.save_for_backward(*kept, *made, *again, *trained)
        ctx.again = slice(len(kept) + len(made), len(kept) + len(made) + len(again))
        ctx.block, ctx.channels_last, ctx.counts = block, channels_last, (len(kept), len(kept) + len(made))
        ctx.size = x.shape[2:]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("SparseConv2d")
        saved = ctx.saved_tensors
        first, second = ctx.counts
        kept = saved[:first]
        if ctx.compute is not None:
            kept = (ctx.compute(*saved[ctx.again]), *kept[1:])
        found = iter(conv_chain_dx(dy, kept, saved[first:second], ctx.block, ctx.size, ctx.channels_last))
        needs = ctx.needs_input_grad
        return tuple([next(found) if need else None for need in needs])


def run_steps(x: Tensor, steps: list[Step]) -> Tensor:
    """Run convolutions that follow one another; they and their norms must be synchronised.

    Args:
        x: [N, C_in, H, W].
    """
    if not (serves(x) and _are_served(steps, x)):
        for conv, norm, act, layers in steps:
            x = ranges.run_as_one(layers, conv.convolve, x, norm, act)
        return x
    if ranges.listener is None:
        return _run_block(x, steps)
    return ranges.run_as_one([layer for step in steps for layer in step.layers], _run_block, x, steps)


def _run_block(x: Tensor, steps: list[Step]) -> Tensor:
    """Run all of them in one native call."""
    recording = torch.is_grad_enabled()
    needs_dx = recording and x.requires_grad
    block = Block([], [], [])
    kept: list[Tensor | None] = [None]
    trained: list[Tensor | None] = []
    for conv, norm, act, _ in steps:
        parts = conv.trained_tensors(norm)
        wants = DX if needs_dx else 0
        if recording:
            for part, bit in zip(parts, (DW, DB, DSHIFT), strict=True):
                if part is not None and part.requires_grad:
                    wants |= bit
        conv.describe(block, kept, norm, act, wants)
        trained += parts
        needs_dx = wants > 0
    channels_last = runs_channels_last(x, block.tensors[0])  # type: ignore[arg-type]
    if not needs_dx:
        with torch.no_grad():  # a full weight may have been asked for a gradient, which nobody computes
            return conv_chain(x, block, channels_last)[0]
    origin = None
    if block.numbers[11] & DW and block.tensors[2] is None:
        origin = origin_of(x)
        kept[0] = x if origin is None else None
    y: Tensor = ConvBlockFunction.apply(x, block, kept, origin, channels_last, *trained)
    return y


def _are_served(steps: list[Step], x: Tensor) -> bool:
    """Whether the native library knows the layers and their types; where channels do not fit, PyTorch says so."""
    channels = x.shape[1]
    for step in steps:
        if step.conv.in_channels != channels or not _is_served(step, x.dtype):
            return False
        channels = step.conv.out_channels
    return True


def _is_served(step: Step, dtype: torch.dtype) -> bool:
    """Whether the native library knows the layer and its types."""
    conv, norm = step.conv, step.norm
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    for p in (weight, bias, *conv.trained_tensors(None)):
        if p is not None and p.dtype is not dtype:
            return False
    if not conv._numbers:
        return False
    if not (weight.is_contiguous() or is_channels_last(weight)):  # type: ignore[union-attr, arg-type]
        return False
    if bias is not None and not bias.is_contiguous():
        return False
    if norm is None:
        return True
    if norm.num_features != conv.out_channels:
        return False
    vectors = [norm.running_mean, norm.running_var, norm._parameters["weight"], norm._parameters["bias"]]
    vectors.append(norm.trained("bias"))
    # A list, for torch.compile follows no generator that is left half-way.
    return not [v for v in vectors if v is not None and not (v.dtype is torch.float32 and v.is_contiguous())]
