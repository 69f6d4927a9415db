"""A small network for measurements: two convolutions, a layer over tokens, one called twice and one never."""

from __future__ import annotations

import torch
from torch import nn

import sparse_bwd as sb


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.drop = nn.Dropout(0.5)
        self.tokens = nn.Linear(6, 8)
        self.unused = nn.Linear(8, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depth(torch.relu(self.norm(self.conv(x))))
        x = self.tokens(self.drop(x).flatten(2).transpose(1, 2)).mean(1)
        return self.head(self.hidden(torch.tanh(self.hidden(x))))


def shapes(model: nn.Module, axis: str) -> dict:
    return {name: (layer, layer.num_channels(axis)) for name, layer in sb.layers(model).items()}


def edit(model: nn.Module, seed: int) -> None:
    """Change every weight, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for layer in sb.layers(model).values():
        with torch.no_grad():
            layer.weight.add_(0.05 * torch.randn(layer.weight.shape, generator=generator))
