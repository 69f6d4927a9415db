"""Saved bytes and the timeline against what is known by hand, on plain PyTorch modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_bwd.memory import SavedTensors, resident_bytes, saved_bytes, saved_storages, timeline

FP32 = 4


class TwoKeepers(nn.Module):
    """Two layers keep the same storage, one of them through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 3, bias=False)
        self.second = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x[:, :4])


def test_linear_keeps_its_input() -> None:
    layer, x = nn.Linear(8, 3), torch.randn(5, 8)
    assert saved_bytes(lambda: layer(x)) == 5 * 8 * FP32


def test_a_storage_counts_once_and_in_full() -> None:
    model, x = TwoKeepers(), torch.randn(5, 8)
    assert saved_bytes(lambda: model(x)) == 5 * 8 * FP32
    layer = nn.Linear(4, 3)
    assert saved_bytes(lambda: layer(x[:, :4])) == 5 * 8 * FP32


def test_frozen_and_no_grad_keep_nothing() -> None:
    layer, x = nn.Linear(8, 3).requires_grad_(False), torch.randn(5, 8)
    assert saved_bytes(lambda: layer(x)) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: nn.Linear(8, 3)(x)) == 0


def test_parameters_and_buffers_count_nothing() -> None:
    norm, x = nn.BatchNorm2d(6).eval().requires_grad_(False), torch.randn(2, 6, 4, 4, requires_grad=True)
    # weight, running mean and running variance are saved beside x; eval mode also saves two empty tensors
    assert saved_bytes(lambda: norm(x)) == 2 * 6 * 4 * 4 * FP32


def test_functional_use_is_excluded_by_name() -> None:
    weight, x = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
    assert saved_bytes(lambda: F.linear(x, weight)) == 3 * 8 * FP32
    assert saved_bytes(lambda: F.linear(x, weight), exclude=[weight]) == 0
    owner = nn.Module()
    owner.register_buffer("weight", weight)
    assert saved_bytes(lambda: F.linear(x, weight), model=owner) == 0


def test_a_leaf_input_counts_though_it_requires_grad() -> None:
    layer, x = nn.Linear(8, 3), torch.randn(5, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x)) == 5 * 8 * FP32


def test_what_the_graph_drops_is_not_counted() -> None:
    layer, x = nn.Linear(8, 3), torch.randn(5, 8)

    def forward() -> Tensor:
        layer(torch.randn(100, 8))  # its result, and with it the graph, is thrown away
        return layer(x)

    assert saved_bytes(forward) == 5 * 8 * FP32


def test_after_backward_nothing_is_kept() -> None:
    layer, x = nn.Linear(8, 3), torch.randn(5, 8)
    assert saved_bytes(lambda: layer(x).sum().backward()) == 0


def test_the_count_leaves_nothing_behind() -> None:
    """Tanh saves its own output: kept with its graph, that output would hold the graph for ever."""
    model, x = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh()), torch.randn(64, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(x).sum().backward()
        optimizer.zero_grad(set_to_none=True)

    saved_bytes(lambda: model(x))
    before = resident_bytes()
    for _ in range(3):
        saved_bytes(lambda: model(x))
        timeline(step, model, optimizer)
    assert resident_bytes() - before < 64 * 512 * FP32


def test_checkpointing_keeps_the_input_only() -> None:
    block = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(5, 8, requires_grad=True)
    assert saved_bytes(lambda: checkpoint(block, x, use_reentrant=False)) <= 5 * 8 * FP32


def test_gradients_are_unchanged_by_the_count() -> None:
    layer, x = nn.Linear(8, 3), torch.randn(5, 8)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    with SavedTensors():
        loss = layer(x).square().sum()
    loss.backward()
    assert torch.equal(layer.weight.grad, expected)


def test_keepers_are_named_innermost_first() -> None:
    model, x = nn.Sequential(TwoKeepers(), nn.Tanh()), torch.randn(5, 8)
    kept = saved_storages(lambda: model(x))
    assert [storage.nbytes for storage in kept] == [5 * 8 * FP32, 5 * 3 * FP32]
    inner = [chain[0] for chain in kept[0].keepers]
    assert inner == [model[0].first, model[0].second]
    assert all(chain[-1] is model for storage in kept for chain in storage.keepers)
    assert kept[0].shapes == ((5, 8), (5, 4))


def test_a_forward_is_asked_for() -> None:
    with pytest.raises(TypeError, match="pass lambda: model"):
        saved_bytes(torch.zeros(1))  # type: ignore[arg-type]


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 10, bias=False))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.randn(32, 64)


def test_timeline_knows_every_kind() -> None:
    model, optimizer, x = trained()

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    weights = (64 * 128 + 128 * 10) * FP32
    first = timeline(step, model, optimizer)
    assert first.allocated["parameter"] == [weights] * len(first.ms)
    assert first.allocated["optimizer"][0] == 0 and first.allocated["optimizer"][-1] == weights
    assert max(first.allocated["gradient"]) == weights and first.allocated["gradient"][-1] == 0
    # tanh keeps its result, which the second layer keeps too; square keeps the output
    assert max(first.allocated["activation"]) == (32 * 128 + 32 * 10) * FP32
    assert first.allocated["activation"][-1] == 0 and first.allocated["transient"][-1] == 0
    assert first.ms == sorted(first.ms)

    second = timeline(step, model, optimizer)
    assert set(second.allocated["optimizer"]) == {weights}
    assert second.total[0] == second.total[-1] == 2 * weights
    assert second.to_dict()["peak"] == max(second.total) - second.total[0]


def test_timeline_refuses_pending_gradients() -> None:
    model, optimizer, x = trained()
    model(x).sum().backward()
    with pytest.raises(ValueError, match="zero_grad"):
        timeline(lambda: None, model, optimizer)


def test_timeline_of_nothing() -> None:
    model, _, _ = trained()
    line = timeline(lambda: None, model)
    assert line.peak == 0 and line.ms == [0.0]
