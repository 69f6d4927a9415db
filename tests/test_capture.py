"""Steps inside machinery that repeats or splits them: graph capture, checkpoints, hooks on saved tensors.

A CUDA graph records what a step launches and must read nothing back; `tests/gpu/test_graphs_cuda.py` records one. Here
the same steps run on the CPU under a watch that knows the operators which would make a GPU wait.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparse_bwd as sb
from sparse_bwd.ops.backend import forced
from tests.tolerance import assert_same_bits

READ_BACK = (
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "item",
)  # fmt: skip
AXES = ("out", "in")


class Watch(TorchDispatchMode):
    """Records operators that hand a value of a tensor to Python, or whose result has a size that values tell."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        indices = args[1] if name in ("index", "index_put_") else ()
        if name in READ_BACK or any(i is not None and i.dtype is torch.bool for i in indices):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Stage(nn.Module):
    """An inverted residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True),
            nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


class Net(nn.Module):
    """Stages between a convolution and a Linear; `through` runs each stage."""

    def __init__(self, through: Callable[[nn.Module, Tensor], Tensor] = lambda stage, x: stage(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.stages = nn.ModuleList([Stage() for _ in range(3)])
        self.pool, self.drop, self.head = nn.MaxPool2d(2), nn.Dropout(0.0), nn.Linear(8 * 9, 5)
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for stage in self.stages:
            x = self.through(stage, x)
        return self.head(self.drop(self.pool(x).flatten(1)))  # type: ignore[no-any-return]


def lean(axis: str, through: Callable[[nn.Module, Tensor], Tensor] | None = None) -> nn.Module:
    """Two channels of every convolution, the head whole."""
    model = Net() if through is None else Net(through)
    sb.convert(model)
    names = [name for name in sb.layers(model) if name != "head"]
    bias = "selected" if axis == "out" else "all"
    sb.apply(model, {name: sb.Channels([0, 2], axis=axis, bias=bias) for name in names})
    return model.train()


def batch(seed: int = 0, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 13, 13, generator=generator).contiguous(memory_format=layout)
    return x, torch.randint(0, 5, (4,), generator=generator)


def gradients(model: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    x, labels = batch(layout=layout)
    F.cross_entropy(model(x), labels).backward()
    return [p.grad for p in sb.trainable_parameters(model)]  # type: ignore[misc]


@pytest.mark.parametrize("implementation", [None, "plain"])
@pytest.mark.parametrize("axis", AXES)
def test_a_step_reads_nothing_back(axis: str, implementation: str | None) -> None:
    model, watch = lean(axis), Watch()
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1, momentum=0.9)
    x, labels = batch()
    with forced(implementation), watch:
        for _ in range(2):
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not watch.seen
    with watch:
        x[x > 0].sum().item()
    assert "_local_scalar_dense" in watch.seen and "index" in watch.seen, "the watch sees what it looks for"


def reentrant(stage: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(stage, x, use_reentrant=True)  # type: ignore[no-any-return]


def recorded(stage: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(stage, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("through", [reentrant, recorded])
@pytest.mark.parametrize("axis", AXES)
def test_checkpointed_blocks(axis: str, through: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """The same bits, and of each stage nothing but its input is kept."""
    model, plain = lean(axis, through), lean(axis)
    for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
        assert_same_bits(ours, theirs)
    x, _ = batch()
    saved = [sb.memory.saved_bytes(lambda net=net: net(x), net) for net in (model, plain)]
    boundary = 4 * 8 * 6 * 6 * 4  # of a stage, in bytes
    within = sum(
        sb.memory.saved_bytes(lambda s=s: s(torch.zeros(4, 8, 6, 6, requires_grad=True)), s)
        for s in plain.stages  # type: ignore[union-attr]
    )
    # Without checkpoints axis "out" keeps the inputs too, "in" only the first, which the ReLU before keeps.
    assert saved[1] - saved[0] == within - (3 if axis == "out" else 2) * boundary
    assert saved[0] < saved[1]


PACKS = {
    "copy": lambda t: t.detach().clone(memory_format=torch.contiguous_format),
    "layout kept": lambda t: t.detach().clone(),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("how", PACKS)
@pytest.mark.parametrize("axis", AXES)
def test_hooks_on_saved_tensors(axis: str, how: str, layout: torch.memory_format) -> None:
    """What is kept may come back as another tensor, and in another layout: offloading does both."""
    model = lean(axis).to(memory_format=layout)  # type: ignore[call-overload]
    plain = copy.deepcopy(model)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return PACKS[how](tensor)  # type: ignore[no-any-return, no-untyped-call]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours = gradients(model, layout)
    for one, other in zip(ours, gradients(plain, layout), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(packed) > 10


def test_offloading_to_the_cpu() -> None:
    model, plain = lean("in"), lean("in")
    with torch.autograd.graph.save_on_cpu():
        ours = gradients(model)
    for one, other in zip(ours, gradients(plain), strict=True):
        assert_same_bits(one, other)
