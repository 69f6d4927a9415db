"""Networks that tests fine-tune by name: `tests.training_net:tiny`."""

import torch
from torch import nn


def tiny(num_classes: int) -> nn.Module:
    """Three convolutions (plain, strided, depthwise) with norms, dropout and a head: 1,512 + 170 weights."""
    return nn.Sequential(
        _block(3, 8), _block(8, 16, stride=2), _block(16, 16, groups=16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(16, num_classes),
    )  # fmt: skip


def still(num_classes: int) -> nn.Module:
    """`tiny` without dropout, so that nothing in a step is random."""
    layers = list(tiny(num_classes))
    return nn.Sequential(*layers[:-2], layers[-1])


def _block(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


def wide() -> nn.Module:
    """A network that was made for 1,000 classes and takes no number of classes."""
    return tiny(1000)


def headless() -> nn.Module:
    """Gives a map instead of one row per image."""
    return nn.Sequential(nn.Conv2d(3, 4, 3))


def broken() -> nn.Module:
    """Runs on no image at all."""
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 10))


def number() -> int:
    """No network."""
    return 7


class Exploding(nn.Module):
    """Its output becomes infinite from the fourth training step on."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = tiny(num_classes)
        self.steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        out: torch.Tensor = self.body(x)
        return out * float("inf") if self.steps > 3 else out


def exploding(num_classes: int) -> nn.Module:
    return Exploding(num_classes)


def linear_only(num_classes: int) -> nn.Module:
    """A classifier and nothing else, for 16 x 16 images."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def bare_linear() -> nn.Module:
    """A head that is no part of anything."""
    return nn.Linear(16, 3)


class Tokens(nn.Module):
    """`still` behind a parameter that no layer holds, as a position embedding."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.body = still(num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x + self.position)
