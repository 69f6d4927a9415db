"""torch.compile: one graph without breaks, and the gradients of the eager layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb

X = (4, 3, 12, 12)


class Residual(nn.Module):
    """A block whose in-place activation overwrites what a second branch reads, a depthwise layer, pooling, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.stem = nn.Sequential(first, nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.norm(self.conv(x))
        x = y * 2 + self.act(y)  # y was not overwritten yet where it is read first, and is afterwards
        x = self.pool(x - y).mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


def converted(axis: str, bias: str) -> nn.Module:
    torch.manual_seed(0)
    model = Residual().eval()
    sb.convert(model)
    rows = {
        name: sb.Channels([0, 2], axis=axis, bias=bias) for name in ("stem.0.0", "stem.1", "conv", "hidden")
    }
    sb.apply(model, {**rows, "norm": sb.Channels([1, 3])})
    return model


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("axis", "bias"), [("out", "selected"), ("out", "all"), ("in", "none"), ("in", "all")]
)
def test_one_graph_with_the_gradients_of_eager(axis: str, bias: str, layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    model = converted(axis, bias)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x = torch.randn(X, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=layout)
        y, z = model(x), compiled(x)
        torch.testing.assert_close(z, y)
        y.square().sum().backward()
        z.square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) is (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-5, atol=1e-5)
