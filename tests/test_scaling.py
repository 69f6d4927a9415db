"""How work grows: the fit, the script of the figures, and counts of calls that do not depend on the machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparse_bwd as sb
from benchmarks.scaling_fit import line, power
from benchmarks.scaling_networks import convolution_weights, network, of_weights, on_meta
from benchmarks.scaling_plan import Life
from sparse_bwd.memory.predict import OPTIMIZERS
from sparse_bwd.selection.charges import channel_costs
from sparse_bwd.selection.costs import cost_table
from sparse_bwd.selection.flops import backward_flops
from sparse_bwd.selection.knapsack import Charges, Limit, solve
from tests.test_benchmarks import PNG, run_module

SIZES = [2**n for n in range(1, 9)]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_fit_finds_an_exponent(exponent: float) -> None:
    fit = power(SIZES, [3 * x**exponent for x in SIZES])
    assert fit.exponent == pytest.approx(exponent, abs=1e-3) and fit.error <= 1e-3
    assert fit.within(exponent) and not fit.within(exponent - 0.1)


def test_the_error_of_the_fit_is_that_of_the_points() -> None:
    """Over many draws the exponents scatter as the fit says."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(400, len(SIZES), generator=generator, dtype=torch.float64)
    found = [power(SIZES, [x * float(e.exp()) for x, e in zip(SIZES, row, strict=True)]) for row in noise]
    scatter = float(torch.tensor([fit.exponent for fit in found]).std())
    assert scatter == pytest.approx(sum(fit.error for fit in found) / len(found), rel=0.3)


def test_a_fixed_cost_is_left_out() -> None:
    values = [20.0 + x for x in SIZES]
    fit = power(SIZES, values)
    assert fit.points == 3 and 0.75 < fit.exponent < 1
    assert power(SIZES, [1e3 + x**2 for x in SIZES]).exponent > 1.8
    assert line(SIZES, values) == pytest.approx((20.0, 1.0))


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 points"):
        power([1, 2], [1, 2])


def calls_of(work: Callable[[], object]) -> int:
    """Calls of functions, in Python and in C."""
    count = 0

    def counter(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counter)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def counted(layers: int) -> dict[str, int]:
    """Calls of everything that happens between steps, on a network of so many convolutions."""
    life = Life(on_meta(4, layers - 1), 2)
    return {name: calls_of(call) for name, call in life.planning().items()}


def test_calls_grow_with_the_layers() -> None:
    """A scan of all layers for each, by `layers(model)[name]` for example, makes sixteen times as many of four."""
    counted(4)  # reads classes and measures operators, once
    few, many = counted(16), counted(64)
    assert len(few) == 15
    for name, calls in many.items():
        assert calls <= 4.4 * few[name], f"{name}: {few[name]} calls for 16 layers, {calls} for 64"


def test_calls_do_not_grow_with_the_channels() -> None:
    """Channels are sorted and gathered in whole tensors; only what is saved is a list, made by one call."""

    def counted(width: int) -> dict[str, int]:
        life = Life(on_meta(width, 4, kernel=1), 2)
        return {name: calls_of(call) for name, call in life.choosing().items()}

    counted(32)
    few, many = counted(32), counted(512)
    for name, calls in many.items():
        assert calls <= 1.2 * few[name], f"{name}: {few[name]} calls for width 32, {calls} for 512"


@pytest.mark.parametrize("policy", ["gradient", "TraDy"])
def test_calls_of_gradient_policies_grow_with_the_layers(policy: str) -> None:
    def counted(layers: int) -> int:
        model = network(10, 4, layers - 1)
        sb.convert(model)
        data, budget = (torch.randn(2, 3, 4, 4), torch.tensor([0, 1])), sb.Budget(fraction=0.5)
        if policy == "TraDy":
            return calls_of(sb.TraDyPolicy(model, budget, data).step)
        return calls_of(sb.GradientNormPolicy(model, budget, data, score="relative").step)

    counted(4)
    assert counted(64) <= 4.4 * counted(16)


def test_calls_of_a_budget_in_bytes_grow_with_the_layers() -> None:
    def counted(layers: int) -> int:
        model = on_meta(4, layers - 1)
        sb.convert(model)
        table, batch = cost_table(model), torch.empty(1, 3, 2, 2)
        return calls_of(lambda: channel_costs(model, table, batch, OPTIMIZERS["sgd"]))

    counted(4)
    assert counted(64) <= 4.4 * counted(16)


def test_the_optimizer_is_searched_once() -> None:
    """No call is made to compare Parameters, so that accesses of the list of Parameters are counted."""
    reads = 0

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal reads
            reads += 1
            return super().__iter__()

    model = network(10, 4, 31)
    sb.convert(model)
    policy = sb.RandomPolicy(model, sb.Budget(fraction=0.5))
    policy.step()
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"] = Counted(optimizer.param_groups[0]["params"])
    policy.step(optimizer)
    assert reads <= 4
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {
        id(p) for p in sb.trainable_parameters(model)
    }


def test_a_refused_group_leaves_no_gap_in_the_optimizer() -> None:
    model = network(10, 4, 3)
    sb.convert(model)
    sb.apply(model, {"0": [0], "3": [1]})
    optimizer = torch.optim.SGD(sb.trainable_parameters(model), lr=0.1)
    with pytest.raises(ValueError, match=r"group\(\) returned 7"):
        sb.apply(model, {"0": [2], "3": [1]}, optimizer, group=lambda name, parameter: 7)
    assert all(isinstance(p, torch.nn.Parameter) for p in optimizer.param_groups[0]["params"])


def drawn(layers: int) -> tuple[list[torch.Tensor], Charges]:
    generator = torch.Generator().manual_seed(layers)

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    charges = Charges(
        9 * draw(layers) + 1,
        torch.arange(layers),
        100 * draw(layers),
        (30 * draw(layers)).flip(0).cumsum(0).flip(0),
    )
    return [draw(16) ** 3 * draw(1) for _ in range(layers)], charges


def test_the_knapsack_of_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more layers than are all tried it loses nearly nothing, and holds no square of their number."""
    scores, charges = drawn(192)
    limit = Limit(charges, 0.3 * charges.cost(torch.full((192,), 16)))

    def total() -> float:
        counts = solve(scores, [limit])
        assert limit.fits(counts)
        best_first = [score.sort(descending=True).values for score in scores]
        return sum(float(score[: int(k)].sum()) for score, k in zip(best_first, counts, strict=True))

    found = total()
    monkeypatch.setattr("sparse_bwd.selection.knapsack.REACH", 192)
    assert found >= 0.995 * total()


def test_the_cost_of_one_channel_is_that_of_a_choice() -> None:
    _, charges = drawn(9)
    each = torch.eye(9, dtype=torch.int64)
    assert charges.of_one().tolist() == pytest.approx([charges.cost(row) for row in each])
    counts = torch.tensor([0, 0, 2, 0, 1, 0, 0, 3, 0])
    extra = [charges.cost(counts + row) - charges.cost(counts) for row in each]
    closed = (counts == 0).nonzero().flatten().tolist()
    opening = charges.of_opening(counts).tolist()
    assert [opening[i] for i in closed] == pytest.approx([extra[i] for i in closed])


def test_a_billion_weights_are_planned_without_any() -> None:
    width, blocks = of_weights(1e9)
    model = on_meta(width, blocks)
    assert convolution_weights(model) == pytest.approx(1e9, rel=0.02)
    sb.convert(model)
    policy = sb.RandomPolicy(model, sb.Budget(fraction=0.1))
    policy.step()
    assert policy.report is not None and policy.report.cost == pytest.approx(0.1e9, rel=0.02)
    assert all(p.device.type == "meta" for p in model.parameters())
    layer = next(iter(sb.layers(model).values()))
    assert layer.channels is not None and layer.channels.device.type == "cpu"  # the selection can be read


@pytest.mark.parametrize("selection", [{"0": [0, 2], "3": None}, {"3": sb.Channels([1], "in")}, {}])
def test_meta_is_planned_as_the_cpu(selection: dict[str, object]) -> None:
    """The prediction, and the choice under a budget of bytes, are those of the model with values."""
    batch = torch.empty(2, 3, 8, 8)
    found = []
    for model in (network(10, 8, 3).eval(), on_meta(8, 3)):
        sb.convert(model)
        sb.apply(model, selection)
        budget = sb.Budget(bytes=60_000, batch=batch)
        predictions = [sb.memory.predict(model, chosen, batch, by_layer=True) for chosen in (None, selection)]
        operations = backward_flops(model, None, batch)
        policy = sb.RandomPolicy(model, budget)
        found.append((*predictions, operations, policy.step(), policy.report))
        sb.restore(model)
    assert found[0] == found[1]


@pytest.mark.long
def test_scaling(tmp_path: Path) -> None:
    shown = run_module("scaling", "--quick", "--out", str(tmp_path))
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert set(record["steps"]) == {"batch", "size", "depth", "width", "selected"}
    assert set(record["plans"]) == {"weights", "layers", "channels", "bytes", "velocity"}
    for sweep in record["steps"].values():
        for row in [*sweep["dense"], *sweep["ours"]]:
            assert row["predicted"] >= row["peak"] > row["saved"] > 0
    assert record["steps"]["batch"]["fits"]["ours"]["saved"]["ok"]
    assert shown == (tmp_path / "scaling.md").read_text() + "\n"
    assert str(tmp_path) not in shown
    assert (tmp_path / "scaling.png").read_bytes().startswith(PNG)
