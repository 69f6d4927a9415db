"""A second derivative is refused with a sentence that names the layer and the way out."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import sparse_bwd as sb

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: sb.SparseConv2d(3, 3, 3),
    "linear": lambda: sb.SparseLinear(6, 6),
    "norm": lambda: sb.BatchNorm2d(3, mode="frozen"),
    "relu": sb.ReLU,
    "pool": lambda: sb.MaxPool2d(2),
    "dropout": lambda: sb.Dropout(0.5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_create_graph_is_refused(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*sparse_bwd\.restore"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
