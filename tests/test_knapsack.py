"""The knapsack with fixed charges: exact on small cases, close to a solver's optimum on real ones."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_bwd as sb
from benchmarks.optimum import upper_bound
from sparse_bwd.memory.predict import OPTIMIZERS
from sparse_bwd.selection.charges import channel_costs
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.selection.knapsack import Charges, Limit, solve


def value(scores: list[Tensor], counts: Tensor) -> float:
    best_first = [score.sort(descending=True).values for score in scores]
    return sum(float(score[: int(k)].sum()) for score, k in zip(best_first, counts, strict=True))


def drawn(layers: int, channels: int, seed: int, units: int = 1) -> tuple[list[Tensor], list[Charges]]:
    """Scores of `layers` layers, some of which share an input, and charges in so many units."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int, top: float = 10.0) -> Tensor:
        return (top * torch.rand(*size, generator=generator, dtype=torch.float64)).round()

    sizes = torch.randint(0, channels + 1, (layers,), generator=generator).tolist()
    group = torch.randint(0, max(layers - 1, 1), (layers,), generator=generator)
    charges = [
        Charges(
            draw(layers) + 1,
            group,
            draw(layers, top=20.0),
            draw(layers, top=20.0).sort(descending=True).values,
        )
        for _ in range(units)
    ]
    return [draw(size) for size in sizes], charges


def optimum(scores: list[Tensor], limits: list[Limit]) -> float:
    """By trying every choice, one at a time; the cost is written out again here."""

    def cost(charges: Charges, counts: tuple[int, ...]) -> float:
        opened = [layer for layer, k in enumerate(counts) if k]
        if not opened:
            return 0.0
        groups = {int(charges.group[layer]) for layer in opened}
        own = sum(k * float(u) for k, u in zip(counts, charges.unit, strict=True))
        return own + sum(float(charges.charge[g]) for g in groups) + float(charges.depth[opened[0]])

    choices = itertools.product(*[range(len(score) + 1) for score in scores])
    fitting = [c for c in choices if all(cost(limit.charges, c) <= limit.amount for limit in limits)]
    return max(value(scores, torch.tensor(c)) for c in fitting)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.integers(1, 2), st.floats(0, 120))
def test_small_cases_are_exact(layers: int, channels: int, seed: int, units: int, amount: float) -> None:
    scores, charges = drawn(layers, channels, seed, units)
    limits = [Limit(c, amount) for c in charges]
    counts = solve(scores, limits)
    assert all(limit.fits(counts) for limit in limits)
    assert value(scores, counts) == pytest.approx(optimum(scores, limits))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("units", [1, 2])
def test_the_fast_method_fits_and_comes_close(monkeypatch: pytest.MonkeyPatch, units: int, seed: int) -> None:
    """Five layers of up to four channels are hard for it: one channel is a large part of the whole."""
    monkeypatch.setattr("sparse_bwd.selection.knapsack.SMALL", 0)
    found = best = 0.0
    scores, charges = drawn(5, 4, seed, units)
    for amount in (15.0, 40.0, 80.0, 160.0):
        limits = [Limit(c, amount) for c in charges]
        counts = solve(scores, limits)
        assert all(limit.fits(counts) for limit in limits)
        found, best = found + value(scores, counts), best + optimum(scores, limits)
    assert found >= 0.9 * best


def test_edges() -> None:
    scores, (charges,) = drawn(6, 9, seed=1)
    everything = torch.tensor([len(score) for score in scores])
    assert torch.equal(solve(scores, [Limit(charges, charges.cost(everything))]), everything)
    assert not solve(scores, [Limit(charges, 0.0)]).any()
    assert charges.cost(torch.zeros(6, dtype=torch.int64)) == 0
    nothing = [torch.zeros(0)] * 6
    assert not solve(nothing, [Limit(charges, 100.0)]).any()


def real_case(name: str, axis: str, seed: int) -> tuple[list[Tensor], Charges, Charges, Tensor]:
    """Charges of a network in a step on four images, and scores that differ between layers and within them."""
    model = torchvision.models.get_model(name, num_classes=10)
    sb.convert(model)
    table = cost_table(model, axis)
    costs = channel_costs(model, table, torch.empty(4, 3, 64, 64), OPTIMIZERS["sgd_momentum"])
    generator = torch.Generator().manual_seed(seed)
    sizes = [table.sizes[i] for i in costs.order.tolist()]
    level = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    scores = [
        level[i] * torch.rand(n, generator=generator, dtype=torch.float64) ** 3 for i, n in enumerate(sizes)
    ]
    return scores, costs.bytes, costs.flops, torch.tensor(sizes)


def assert_within_two_percent(name: str, axis: str, share: float, both: bool, seed: int = 0) -> None:
    scores, size, operations, everything = real_case(name, axis, seed)
    limits = [Limit(size, share * size.cost(everything))]
    if both:
        limits.append(Limit(operations, share * operations.cost(everything)))
    counts = solve(scores, limits)
    assert all(limit.fits(counts) for limit in limits)
    assert value(scores, counts) >= 0.98 * upper_bound(scores, limits)


def test_a_real_network() -> None:
    assert_within_two_percent("resnet18", "out", 0.2, both=False)


@pytest.mark.long
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "resnet50"])
def test_real_networks_at_many_budgets(name: str, axis: str, share: float, both: bool) -> None:
    for seed in range(2):
        assert_within_two_percent(name, axis, share, both, seed)
