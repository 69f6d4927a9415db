"""torch.compile and selections: one graph for all of the same layers, one more per new set, values as eager."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.ops.backend import forced

LAYERS = ("stem.0", "stem.3", "hidden")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graphs of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """A block of two convolutions, one of them depthwise, a norm by itself, and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Conv2d(8, 8, 3, groups=8)
        )  # fmt: skip
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.norm(self.stem(x)).mean((2, 3))))  # type: ignore[no-any-return]


class Counting:
    """The backend aot_eager, and how many graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # type: ignore[no-any-return]


def small(layout: str = "nchw") -> nn.Module:
    torch.manual_seed(0)
    model = Small().eval().to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    sb.convert(model)
    return model  # type: ignore[no-any-return]


def selection(model: nn.Module, axis: str, k: int, first: int) -> dict[str, sb.Channels]:
    """k channels of every layer, from channel `first` on; one less than all where a layer has no more."""
    chosen = {}
    for name in LAYERS:
        count = sb.layers(model)[name].num_channels(axis)
        index = sorted((i + first) % count for i in range(min(k, count - 1)))
        chosen[name] = sb.Channels(index, axis=axis, bias="selected" if axis == "out" else "all")
    chosen["norm"] = sb.Channels(sorted((i + first) % 8 for i in range(k)))
    return chosen


def images(layout: str = "nchw", batch: int = 4, seed: int = 0) -> Tensor:
    x = torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=LAYOUTS[layout])


def assert_same_step(model: nn.Module, compiled: Any, twin: nn.Module, x: Tensor) -> None:
    """A step of SGD of the compiled model and of its eager twin: output, gradients, weights afterwards."""
    y, z = compiled(x), twin(x)
    torch.testing.assert_close(y, z)
    for output, net in ((y, model), (z, twin)):
        net.zero_grad()
        output.square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) is (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for net in (model, twin):
        torch.optim.SGD(sb.trainable_parameters(net), lr=0.1).step()
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    for net in (model, twin):
        net.zero_grad()


@pytest.mark.parametrize(
    ("axis", "layout", "implementation"),
    [
        ("out", "channels_last", None),
        ("in", "nchw", None),
        pytest.param("in", "channels_last", "plain", marks=pytest.mark.long),
        pytest.param("out", "nchw", "plain", marks=pytest.mark.long),
    ],
)
def test_other_channels_and_counts_are_the_same_graph(
    axis: str, layout: str, implementation: str | None
) -> None:
    """k = 1 among them, and training goes on between the selections."""
    model = small(layout)
    twin = copy.deepcopy(model)
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with forced(implementation):
        for step, k in enumerate((2, 3, 1, 4, 2)):
            for net in (model, twin):
                sb.apply(net, selection(net, axis, k, step))
            with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
                for seed in range(2):
                    assert_same_step(model, compiled, twin, images(layout, seed=10 * step + seed))
    assert counting.graphs == 1


def test_a_new_set_of_layers_is_one_more_graph_and_an_old_one_none() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 5))
    sb.convert(model, always_train=[])
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    graphs = []
    for step, names in enumerate(["023", "02", "023", "23", "02"]):
        for k in (1, 3):
            sb.apply(model, {name: sb.Channels([(step + i) % 5 for i in range(k)]) for name in names})
            assert_same_step(model, compiled, copy.deepcopy(model), torch.randn(3, 6))
        graphs.append(counting.graphs)
    assert graphs == [1, 2, 2, 3, 3]
    sb.apply(model, {"0": sb.Channels(None), "2": sb.Channels([1]), "3": sb.Channels([1])})
    assert_same_step(model, compiled, copy.deepcopy(model), torch.randn(3, 6))
    assert counting.graphs == 4, "a layer trained whole shares memory with its weight: another graph"


def test_batches_of_any_size() -> None:
    model = small()
    sb.apply(model, selection(model, "out", 2, 0))
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for batch in (4, 6, 5, 9, 2):
        with torch.compiler.set_stance("default" if batch in (4, 6) else "fail_on_recompile"):
            assert_same_step(model, compiled, copy.deepcopy(model), images(batch=batch))
    assert counting.graphs == 2, "the first size, and then any"


@pytest.mark.parametrize("mode", ["bias", pytest.param("train", marks=pytest.mark.long)])
def test_other_modes_of_norms(mode: str) -> None:
    """A shift trained whole, which shares memory with its full vector, and statistics of the batch."""
    torch.manual_seed(0)
    model = Small()
    sb.convert(model, batch_norm=mode)
    chosen = selection(model, "out", 2, 0)
    del chosen["norm"]
    sb.apply(model, chosen)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        assert_same_step(model, compiled, twin, images(seed=seed))


@pytest.mark.parametrize(
    ("axis", "chosen"), [("out", [[0, 5], [1, 6], [0, 2, 4, 7]]), ("in", [[1], [3], [0, 2]])]
)
def test_grouped_layers_while_as_many_groups_are_touched_alike(axis: str, chosen: list[list[int]]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))
    sb.convert(model, always_train=["0"])
    counting = Counting()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    for index in chosen:
        bias = "selected" if axis == "out" else "none"
        sb.apply(model, {"2": sb.Channels(index, axis=axis, bias=bias)})
        assert_same_step(model, compiled, copy.deepcopy(model), images())
    assert counting.graphs == 1


class Stage(nn.Module):
    """A residual block of a network of twelve."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6(inplace=True),
            nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


def test_regional_compilation_of_twelve_blocks() -> None:
    """Two graphs for all: the first block, whose input needs no gradient, and the others; no more at a re-selection."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Stage() for _ in range(12)]).eval()
    sb.convert(model, always_train=[])
    counting = Counting()

    def select(first: int) -> None:
        """Other numbers of channels in every block."""
        chosen = {}
        for i, (name, layer) in enumerate(sb.layers(model).items()):
            count = layer.num_channels()
            chosen[name] = sb.Channels(
                sorted((first + j) % count for j in range(1 + (i + first) % (count - 2)))
            )
        sb.apply(model, chosen)

    select(0)
    for block in model:
        block.compile(backend=counting, fullgraph=True)
    for first in range(3):
        select(first)
        twin = copy.deepcopy(model)
        for block in twin:
            block._compiled_call_impl = None
        with torch.compiler.set_stance("default" if first == 0 else "fail_on_recompile"):
            x = torch.randn(2, 6, 5, 5)
            assert_same_step(model, model, twin, x)
    assert counting.graphs == 2


def copies(model: nn.Module) -> dict[str, nn.Module]:
    moved = copy.deepcopy(model).double().float()
    strided = (
        copy.deepcopy(model).to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format)
    )  # type: ignore[call-overload]
    return {
        "deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model)), "moved": moved, "layout": strided
    }  # fmt: skip


LONG_COPIES = [pytest.param(how, marks=pytest.mark.long) for how in ("pickle", "moved")]


@pytest.mark.parametrize("how", ["deepcopy", "layout", *LONG_COPIES])
def test_copies_train_their_own_parameters(how: str) -> None:
    """What graphs read is rebuilt: a copy that kept the old view would leave its own Parameters without a gradient."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    sb.convert(model, always_train=[])
    sb.apply(model, {"0": sb.Channels([1, 4]), "2": sb.Channels([2, 3, 5], axis="in", bias="all")})
    before = copy.deepcopy(model.state_dict())
    made = copies(model)[how]
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_same_step(made, compiled, copy.deepcopy(made), torch.randn(2, 3, 6, 6))
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"training a copy changed {name} of the original"


class Four(nn.Module):
    """Four small layers; dynamo compiles its forward, and not that of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_limit_of_dynamo_is_a_sentence() -> None:
    """Sets that were compiled, and models that nobody compiles, are not warned of."""
    model, plain = Four(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for net in (model, plain):
        sb.convert(net, always_train=[])
    compiled = torch.compile(model, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for i in (0, 1, 0):
            sb.apply(model, {f"layers.{i}": sb.Channels([1])})
            compiled(torch.randn(1, 4, 3, 3)).sum().backward()
            model.zero_grad()
        with pytest.warns(RuntimeWarning, match=r"Four.forward 2 times.*keep_layers=True.*recompile_limit"):
            sb.apply(model, {"layers.2": sb.Channels([1])})
        sb.apply(model, {"layers.1": sb.Channels([0, 3])})
        for name in ("0", "1"):
            sb.apply(plain, {name: sb.Channels([1])})
