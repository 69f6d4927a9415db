"""The demo's network and data: scikit-learn's digits, enlarged and split into old and new classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64


class Separable(nn.Module):
    """Depthwise and pointwise convolution, each with norm and ReLU; [N, c_in, H, W] -> [N, c_out, H/s, W/s]."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        depthwise = nn.Conv2d(c_in, c_in, 3, stride, 1, groups=c_in, bias=False)
        pointwise = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(c_in), nn.ReLU())
        self.pointwise = nn.Sequential(pointwise, nn.BatchNorm2d(c_out), nn.ReLU())
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(self.depthwise(x))
        return x + y if self.residual else y


def digit_network(classes: int = 5) -> nn.Sequential:
    """13 convolutions, 48 thousand weights, for images [N, 1, 24, 24]."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    sizes = [(16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 128, 1)]
    blocks = [Separable(c_in, c_out, stride) for c_in, c_out, stride in sizes]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 24, 24] in [-1, 1] and labels [N] of five digits, split into train and test by a seed."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def load(cls, first: int, share: float, seed: int) -> Digits:
        """The digits `first` to `first + 4`; `share` of them to train."""
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
        labels = torch.tensor(data.target) - first
        images, labels = (t[(labels >= 0) & (labels < 5)] for t in (images, labels))
        images = F.interpolate(images, size=(24, 24), mode="bilinear").contiguous(
            memory_format=torch.channels_last
        )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, test = order[: int(share * len(order))], order[int(share * len(order)) :]
        return cls(images[train], labels[train], images[test], labels[test])

    def batches(self, generator: torch.Generator) -> list[Tensor]:
        """Indices of the batches of one epoch in a new order; the last, incomplete batch is dropped."""
        order = torch.randperm(len(self.y), generator=generator)
        return [batch for batch in order.split(BATCH) if len(batch) == BATCH]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that `model` classifies rightly, in per cent; leaves it in eval mode."""
        model.eval()
        with torch.no_grad():
            right = model(self.x_test).argmax(1) == self.y_test
        return 100 * float(right.float().mean())
