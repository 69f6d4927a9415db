"""Small networks that hold every kind of layer the library swaps, for tests of whole models."""

import random
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from tests.cases import channel_count

IMAGE = (4, 3, 12, 12)
CLASSES = 5


class TinyNet(nn.Module):
    """Plain, depthwise, grouped and biased convolutions with norms, a residual add, pooling and two Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(8 * 9, 10)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.depthwise(x)
        x = self.pool(self.act(self.norm(self.grouped(x))))
        hidden: Tensor = self.drop(torch.relu(self.hidden(x.flatten(1))))
        out: Tensor = self.head(hidden)
        return out


WEIGHTED = ("stem.0", "depthwise.0", "grouped", "hidden", "head")
NORMS = ("stem.1", "depthwise.1", "norm")


def tiny_net(seed: int = 0) -> TinyNet:
    """A TinyNet with fixed values and statistics that are not the trivial ones."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = TinyNet()
    for name in NORMS:
        norm = model.get_submodule(name)
        assert (
            isinstance(norm, nn.BatchNorm2d)
            and norm.running_mean is not None
            and norm.running_var is not None
        )
        with torch.no_grad():
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    torch.random.set_rng_state(state)
    return model


def frozen_norms(model: nn.Module) -> nn.Module:
    """A plain model in train mode whose norms use their running statistics: what ours computes by default."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def converted_net(seed: int = 0, batch_norm: str = "frozen") -> Any:
    """A converted TinyNet whose head is selected like every other layer."""
    model = tiny_net(seed)
    sb.convert(model, batch_norm=batch_norm, always_train=[])
    return model.train()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGE, generator=generator), torch.randint(0, CLASSES, IMAGE[:1], generator=generator)


def drawn_selection(seed: int, axes: tuple[str, ...] = ("out", "in")) -> dict[str, sb.Channels]:
    """A random selection over the weighted layers of a TinyNet; some layers stay frozen."""
    pick = random.Random(seed)
    model, selection = tiny_net(), {}
    for name in WEIGHTED:
        if pick.random() < 0.2:
            continue
        axis = pick.choice(axes)
        count = channel_count(model.get_submodule(name), axis)
        index = sorted(pick.sample(range(count), pick.randint(1, count)))
        bias = pick.choice(("selected", "all", "none") if axis == "out" else ("all", "none"))
        selection[name] = sb.Channels(index, axis=axis, bias=bias)
    return selection
