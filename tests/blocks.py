"""Random blocks of [convolution, norm on running statistics, activation] on numbers whose results are exact.

Weights, images and gradients are small integers and norms scale by powers of two, so that every order of summation
gives the same bits in float32, and no flag of an activation depends on rounding.
"""

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from benchmarks.masked import is_depthwise
from sparse_bwd.nn.affine_act import BatchNorm2d as OurNorm
from tests.cases import LAYOUTS, bias_modes
from tests.native_calls import integers

ACTS = (
    lambda: None, nn.ReLU, nn.ReLU6, lambda: nn.Hardtanh(-2.0, 3.0), lambda: nn.LeakyReLU(0.25), lambda: nn.ReLU(True),
)  # fmt: skip


@dataclass
class Block:
    """A stock model, the converted one with its selection, the input, and the layers of each run."""

    stock: nn.Sequential
    ours: Any
    x: Tensor
    needs_x: bool
    runs: list[list[nn.Module]] = field(default_factory=list)

    def oracle(self) -> nn.Module:
        return copy.deepcopy(self.stock).double()


def draw_conv(pick: random.Random, channels: int, image: tuple[int, int], dtype: torch.dtype) -> nn.Conv2d:
    """A convolution that fits the image."""
    while True:
        kind = pick.choice(("1x1", "1x1", "any", "depthwise", "depthwise"))
        out = channels if kind == "depthwise" else pick.choice((1, 3, 8, 13, 16))
        if kind == "1x1":
            return nn.Conv2d(channels, out, 1, bias=pick.random() < 0.3)
        kernel = pick.choice(((3, 3), (3, 3), (5, 5), (2, 2), (4, 3), (1, 1)))
        stride, padding, dilation = (
            pick.choice((1, 1, 2, 3)),
            pick.choice((0, 1, 1, 2)),
            pick.choice((1, 1, 2)),
        )
        if image[1] < stride:
            dilation = 1  # torch 2.14 crashes in the forward of dilated convolutions of such images
            stride = (
                stride if dtype is torch.float32 else 1
            )  # and its dw in bfloat16 is read from beyond them
        if all(dilation * (k - 1) < size + 2 * padding for k, size in zip(kernel, image, strict=True)):
            groups = channels if kind == "depthwise" else 1
            return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, pick.random() < 0.5)


def draw_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=0.0)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(integers(channels))  # type: ignore[union-attr]
        norm.running_var.copy_(4.0 ** integers(channels, largest=1))  # type: ignore[union-attr]
    return norm.eval()


def select(pick: random.Random, conv: Any, kind: str) -> None:
    """Choose what a convolution trains: "none", "bias", "some" or "whole"."""
    axis = pick.choice(("out", "in"))
    count = conv.num_channels(axis)
    index = {"some": sorted(pick.sample(range(count), pick.randint(1, count))), "whole": None}.get(kind, [])
    modes = {"none": ("none",), "bias": ("all",)}.get(kind, bias_modes(axis))
    conv.set_channels(index, axis=axis, bias=pick.choice(modes))


def draw(seed: int, dtype: torch.dtype = torch.float32, most: int = 4) -> Block:
    """A block of 1 to `most` runs, drawn from a seed."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    channels, shape = (
        pick.choice((1, 3, 8, 11, 16, 19)),
        pick.choice(((7, 9), (6, 6), (1, 11), (9, 1), (1, 1), (12, 5))),
    )
    x = integers(pick.randint(1, 2), channels, *shape, dtype=dtype)
    y, stacks = x.float(), []
    for _ in range(pick.randint(1, most)):
        conv = draw_conv(pick, y.shape[1], (y.shape[2], y.shape[3]), dtype)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.copy_(integers(*parameter.shape, largest=1) * (torch.rand(parameter.shape) < 0.5))
            y = conv(y)
        norm = draw_norm(conv.out_channels) if pick.random() < 0.7 else None
        stacks.append([m for m in (conv.to(dtype), norm, pick.choice(ACTS)()) if m is not None])
    stock = nn.Sequential(*[m for stack in stacks for m in stack])
    nested = nn.Sequential(nn.Sequential(*stacks[0]), *[m for stack in stacks[1:] for m in stack])
    if pick.random() < 0.5:
        stock = nested
    if pick.random() < 0.5:
        stock.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours: Any = copy.deepcopy(stock)
    sb.convert(ours, always_train=[])
    for layer in ours.modules():
        if isinstance(layer, sb.SparseConv2d):
            select(pick, layer, pick.choice(("none", "bias", "some", "some", "whole")))
        elif isinstance(layer, OurNorm):
            count = layer.num_features
            layer.set_channels(
                pick.choice(([], None, sorted(pick.sample(range(count), pick.randint(1, count)))))
            )
    block = Block(stock, ours, LAYOUTS[pick.choice(("contiguous", "channels_last"))](x), pick.random() < 0.6)
    block.runs = runs_of(ours)
    return block


def runs_of(model: nn.Module) -> list[list[nn.Module]]:
    """Each convolution with what follows it."""
    runs: list[list[nn.Module]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            runs.append([module])
        elif not isinstance(module, nn.Sequential):
            runs[-1].append(module)
    return runs


def expected_bytes(block: Block) -> int:
    """Section 5 of DESIGN.md, layer by layer, index vectors included."""
    total, below, x = 0, block.needs_x, block.x
    for run in block.runs:
        conv: Any = run[0]
        norm: Any = next((m for m in run if isinstance(m, OurNorm)), None)
        with torch.no_grad():
            y = nn.Conv2d._conv_forward(conv, x, conv.weight, conv.bias)
        if conv.trainable_weight is not None:
            slices = is_depthwise(conv) or conv.axis == "in"
            count = conv.num_channels(conv.axis)
            k = count if conv.channels is None else conv.channels.numel()
            total += x.nbytes * k // count if slices else x.nbytes
            total += 8 * k if k < count and conv.axis == "out" else 0
        if conv.trainable_weight is not None or conv.trainable_bias is not None:
            below = True
        if norm is not None:
            total += 4 * y.shape[1] if below else 0
            if norm.trainable_bias is not None:
                below, rows = True, norm._slots["bias"].index
                total += 0 if rows is None else 8 * rows.numel()
        acts = [m for m in run[1:] if m is not norm]
        total += -(-y.numel() // 8) if acts and below else 0
        x = y
    return total
