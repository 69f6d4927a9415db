"""Layers of MobileNetV2, ResNet-18, ResNet-50 and ViT-S at 224 x 224, each distinct one once.

Written down from their papers, for machines that have no torchvision. Convolutions pad so that stride 1 keeps the size,
but those of patches, which do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Conv(NamedTuple):
    """A square convolution on size x size pixels, and the activation behind its norm ("" where no norm follows)."""

    c_in: int
    c_out: int
    kernel: int
    stride: int
    groups: int
    size: int
    act: str

    @property
    def padding(self) -> int:
        return 0 if self.stride == self.kernel else (self.kernel - 1) // 2

    @property
    def size_out(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def __str__(self) -> str:
        kind = "" if self.groups == 1 else "depthwise " if self.groups == self.c_in else "grouped "
        return f"{kind}{self.kernel}x{self.kernel} {self.c_in} -> {self.c_out}, stride {self.stride}, {self.size}^2"


class Linear(NamedTuple):
    """A Linear that sees so many tokens of each image."""

    c_in: int
    c_out: int
    tokens: int

    def __str__(self) -> str:
        return f"linear {self.c_in} -> {self.c_out}, {self.tokens} tokens"


class Pool(NamedTuple):
    """Max pooling of 3 x 3 with stride 2 on size x size pixels."""

    channels: int
    size: int

    @property
    def size_out(self) -> int:
        return (self.size - 1) // 2 + 1

    def __str__(self) -> str:
        return f"max_pool 3x3, {self.channels} channels, {self.size}^2"


Layer = Conv | Linear | Pool


def mobilenet_v2() -> list[Layer]:
    """Expansion, channels, repetitions and stride of each stage are those of the paper's table 2."""
    found: list[Layer] = [Conv(3, 32, 3, 2, 1, 224, "hardtanh")]
    channels, size = 32, 112
    stages = (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip
    for expansion, c_out, repetitions, first in stages:
        for stride in (first, *[1] * (repetitions - 1)):
            wide = expansion * channels
            if expansion > 1:
                found.append(Conv(channels, wide, 1, 1, 1, size, "hardtanh"))
            found.append(Conv(wide, wide, 3, stride, wide, size, "hardtanh"))
            size //= stride
            found.append(Conv(wide, c_out, 1, 1, 1, size, "none"))
            channels = c_out
    return _distinct([*found, Conv(320, 1280, 1, 1, 1, 7, "hardtanh"), Linear(1280, 1000, 1)])


def resnet18() -> list[Layer]:
    """Two 3x3 convolutions in each block."""
    found: list[Layer] = [Conv(3, 64, 7, 2, 1, 224, "relu"), Pool(64, 112)]
    channels, size = 64, 56
    for c_out in (64, 128, 256, 512):
        for block in range(2):
            stride = 2 if block == 0 and c_out > 64 else 1
            found.append(Conv(channels, c_out, 3, stride, 1, size, "relu"))
            if stride > 1:
                found.append(Conv(channels, c_out, 1, stride, 1, size, "none"))
            size //= stride
            found.append(Conv(c_out, c_out, 3, 1, 1, size, "none"))
            channels = c_out
    return _distinct([*found, Linear(512, 1000, 1)])


def resnet50() -> list[Layer]:
    """1x1, 3x3 and 1x1 in each block; the 3x3 has the stride, as in torchvision."""
    found: list[Layer] = [Conv(3, 64, 7, 2, 1, 224, "relu"), Pool(64, 112)]
    channels, size = 64, 56
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            found.append(Conv(channels, width, 1, 1, 1, size, "relu"))
            found.append(Conv(width, width, 3, stride, 1, size, "relu"))
            if block == 0:
                found.append(Conv(channels, 4 * width, 1, stride, 1, size, "none"))
            size //= stride
            found.append(Conv(width, 4 * width, 1, 1, 1, size, "none"))
            channels = 4 * width
    return _distinct([*found, Linear(2048, 1000, 1)])


def vit_s() -> list[Layer]:
    """Patches of 16 x 16, 196 of them and a class token, width 384."""
    width, tokens = 384, 197
    return [
        Conv(3, width, 16, 16, 1, 224, ""),
        Linear(width, 3 * width, tokens),
        Linear(width, width, tokens),
        Linear(width, 4 * width, tokens),
        Linear(4 * width, width, tokens),
        Linear(width, 1000, 1),
    ]


def _distinct(layers: list[Layer]) -> list[Layer]:
    return list(dict.fromkeys(layers))


NETWORKS: dict[str, Callable[[], list[Layer]]] = {
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit_s": vit_s,
}
