"""Layers over tokens on a GPU: gradients of what is selected, and saved bytes, also under autocast.

Every test also runs on the CPU, so that what a GPU is asked, and what is expected of it, is tried everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.measure.kernels import precision
from tests.tolerance import assert_close_to_oracle

NO_GPU = not torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")])
SELECTION = {
    "table": sb.Channels([1, 4]),
    "wave": sb.Channels([0, 5]),
    "norm": sb.Channels([2]),
    "attention.in_proj": sb.Channels([3, 20, 47], bias="all"),
    "wide": sb.Channels([1, 7], axis="in", bias="all"),
    "narrow": sb.Channels([0, 9]),
}


class Tokens(nn.Module):
    """One of each kind of layer over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.wave = nn.Embedding(9, 16), nn.Conv1d(16, 16, 3, padding=1)
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.scale, self.wide, self.act = nn.RMSNorm(16), nn.Linear(16, 32), nn.GELU()
        self.narrow, self.head = nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wave(self.table(ids).transpose(1, 2)).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.narrow(self.act(self.wide(self.scale(x))))
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the step runs; float32 is exact."""
    with precision("fp32"):
        yield request.param


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
def test_step(device: str, low: bool) -> None:
    torch.manual_seed(0)
    plain = Tokens().to(device)
    model, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    sb.convert(model)
    sb.apply(model, SELECTION)
    ids = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(1)).to(device)
    dy = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).to(device)
    outputs = []
    for net in (model, plain, exact):
        with torch.autocast(device, torch.bfloat16, enabled=low and net is not exact):
            outputs.append(net(ids))
        outputs[-1].backward(dy.to(outputs[-1].dtype))
    assert_close_to_oracle(*[output.detach() for output in outputs], "y")
    for name, layer in {**sb.layers(model), **sb.norms(model)}.items():
        part = layer._parameters["trainable_bias" if name == "norm" else "trainable_weight"]
        if part is None:
            continue
        kind = "bias" if name == "norm" else "weight"
        stock = "attention.in_proj_weight" if name == "attention.in_proj" else f"{name}.{kind}"
        dim = 1 if layer.axis == "in" else 0
        grads = [net.get_parameter(stock).grad for net in (plain, exact)]
        dense, wide = (grad.index_select(dim, layer.channels) for grad in grads)
        assert_close_to_oracle(part.grad, dense, wide, stock)


def test_saved_bytes(device: str) -> None:
    """The readers of a norm and of an activation keep nothing beside what those keep."""
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).to(device)
    sb.convert(model, always_train=[])
    sb.apply(model, {"1": [0], "3": [0]})
    x = torch.randn(5, 16, device=device, requires_grad=True)
    kept = 5 * 4 * (16 + 2 + 32) + 2 * 8
    assert sb.memory.saved_bytes(lambda: model(x), model) == kept
