"""What a compiled graph keeps for backward: with inductor what eager layers keep, to the byte."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.ops.backend import forced
from tests.meter import saved_bytes


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Mixed(nn.Module):
    """Convolutions whose input is kept whole or in part, a depthwise one, norm, activations, pooling, Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU6(inplace=True),
            nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(16, 12, 1)
        self.hidden = nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.last(self.pool(self.stem(x))).mean((2, 3))))  # type: ignore[no-any-return]


TRAINED = ("stem.0", "stem.3", "last", "hidden")


def converted(axis: str, k: int) -> nn.Module:
    torch.manual_seed(0)
    model = Mixed().eval()
    sb.convert(model, always_train=["head"])
    bias = "selected" if axis == "out" else "all"
    sb.apply(model, {name: sb.Channels(list(range(k)), axis=axis, bias=bias) for name in TRAINED})
    return model


def constants(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("implementation", [None, pytest.param("plain", marks=pytest.mark.long)])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_inductor_keeps_what_eager_layers_keep(axis: str, implementation: str | None) -> None:
    """Also for other k than the one that was compiled; on axis "in" not the whole input, from which it could gather."""
    model = converted(axis, 2)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    with forced(implementation):
        for k in (2, 1):
            for net in (model, twin):
                sb.apply(net, {n: sb.Channels(list(range(k)), axis=axis, bias="none") for n in TRAINED})
            y, kept = saved_bytes(lambda: model(x), constants(model))
            z, theirs = saved_bytes(lambda: compiled(x), constants(twin))
            assert theirs == kept
            assert sb.memory.saved_bytes(lambda: compiled(x), model=twin) == kept
            torch.testing.assert_close(z, y)
            y.square().sum().backward()
            z.square().sum().backward()
            for (name, ours), others in zip(model.named_parameters(), twin.parameters(), strict=True):
                if ours.grad is not None:
                    torch.testing.assert_close(others.grad, ours.grad, rtol=1e-4, atol=1e-5, msg=name)
            for net in (model, twin):
                net.zero_grad()


def test_aot_eager_keeps_copies_of_the_trained_weights() -> None:
    """It makes every write into a weight a new tensor, which backward then reads for dx; a backend for debugging."""
    model = converted("out", 2)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 10, 10)
    _, kept = saved_bytes(lambda: model(x), constants(model))
    z, theirs = saved_bytes(lambda: compiled(x), constants(twin))
    read = [sb.layers(model)[name].weight for name in TRAINED[1:]]  # of the first layer no dx is needed
    assert theirs - kept == sum(weight.nbytes for weight in read)
    assert z.grad_fn is not None
