"""A small network with every kind of layer that can be selected."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.selection.costs import CostTable

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Small(nn.Module):
    """Dense, depthwise and grouped convolutions with and without bias, norms, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.hidden = nn.Linear(12, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.depth(torch.relu(self.norm(self.stem(x)))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def small_net() -> nn.Sequential:
    """Three convolutions (dense, depthwise, pointwise without bias), a norm and two linear layers, converted."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.Linear(10, 3),
    )
    sb.convert(net)
    return net


def train(model: nn.Module, seed: int) -> None:
    """One optimizer step on drawn data, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.05)
    model(torch.randn(8, 3, 6, 6, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def batches(count: int = 1, size: int = 12, images: int = 4, classes: int = 3) -> Batches:
    """Labelled images, the same in every call."""
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(images, 3, size, size, generator=generator),
            torch.randint(classes, (images,), generator=generator),
        )
        for _ in range(count)
    ]


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images for `small_net` and their classes, the same in every call."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 3, 6, 6, generator=generator), torch.tensor([0, 1, 2, 0])


def unread(*_: Any) -> Any:
    """Data, or a hook, that must not be used."""
    raise AssertionError("the data was read")


def rows_of(selection: sb.Selection, table: CostTable) -> set[int]:
    """The rows of the table that a selection trains."""
    starts = dict(zip(table.names, torch.tensor([0, *table.sizes[:-1]]).cumsum(0).tolist(), strict=True))
    return {starts[name] + int(i) for name, c in selection.items() for i in c.index}


def trained(model: nn.Module) -> dict[str, list[int] | None]:
    """What the layers themselves say is trained."""
    found = {}
    for name, layer in sb.layers(model).items():
        if layer.channels is None or len(layer.channels):
            found[name] = None if layer.channels is None else layer.channels.tolist()
    return found
