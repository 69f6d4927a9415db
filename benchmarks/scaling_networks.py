"""Networks of any depth, width and number of weights for `benchmarks.scaling`, and measurements that are drawn.

A model on the meta device has no values. What a policy plans from values is then planned from drawn ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.selection.ranked import RankedPolicy
from sparse_bwd.selection.schemes import Scheme
from sparse_bwd.selection.weights import WeightMeter

CLASSES = 10


def network(classes: int, width: int, blocks: int, kernel: int = 3, device: str = "cpu") -> nn.Sequential:
    """A stem, `blocks` times convolution, norm and ReLU of `width` channels at full resolution, and a classifier."""
    made: list[nn.Module] = []
    for c_in in (3, *[width] * blocks):
        convolution = nn.Conv2d(c_in, width, kernel, padding=kernel // 2, bias=False, device=device)
        made += [convolution, nn.BatchNorm2d(width, device=device), nn.ReLU()]
    return nn.Sequential(
        *made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes, device=device)
    )


def builder(width: int, blocks: int) -> Callable[[int], nn.Module]:
    """The function of the number of classes that a `Setting` wants."""
    return partial(network, width=width, blocks=blocks)


def of_weights(weights: float) -> tuple[int, int]:
    """(width, blocks) of a network of about so many weights: half as deep again for each factor of ten, and wider."""
    blocks = round(4 * 1.5 ** math.log10(weights / 1e4))
    return max(round(math.sqrt(weights / 9 / blocks)), 1), blocks


def on_meta(width: int, blocks: int, kernel: int = 3) -> nn.Module:
    """The network without values: nothing is allocated."""
    return network(CLASSES, width, blocks, kernel, "meta").eval()


def convolution_weights(model: nn.Module) -> int:
    """Weights of all convolutions."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))


class DrawnPolicy(RankedPolicy):
    """What GradientNormPolicy and WeightNormPolicy do with their scores, from drawn ones."""

    def _score(self) -> Tensor:
        return torch.rand(len(self.table), generator=self.generator, dtype=torch.float64)


class DrawnMeter(WeightMeter):
    """phi of every channel drawn; for the policies of velocity, which then measure nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def measure(
        self, model: nn.Module, channels: Mapping[str, Any], axis: str, probe: Any
    ) -> dict[str, Tensor]:
        """One number for each channel."""
        return {
            name: torch.rand(count, generator=self.generator, dtype=torch.float64)
            for name, (_, count) in channels.items()
        }


def half_scheme(model: nn.Module) -> Scheme:
    """Half of the channels of the second half of the convolutions."""
    count = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    chosen = tuple(range(count // 2, count))
    return Scheme("half", None, count - count // 2, chosen, (0.5,) * len(chosen))
