"""Velocity from sketches: the signs, the operator, and the meter beside the exact one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import sparse_bwd as sb
from sparse_bwd.ops import reference, response_sketch
from sparse_bwd.ops.sketch import signs
from sparse_bwd.selection.responses import ResponseMeter
from sparse_bwd.selection.sketch import SketchMeter
from tests.tolerance import assert_same_bits
from tests.velocity_net import Net, edit, shapes

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float64).eps
# An event of this probability would be a defect of the generator, not bad luck.
RARE = 1e-9


def hoeffding(count: int, looks: int = 1) -> float:
    """What the sum of `count` independent signs exceeds with probability RARE in any of `looks` sums."""
    return math.sqrt(2 * count * math.log(2 * looks / RARE))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    sb.convert(net)
    return net


def units(*shape: int) -> Tensor:
    """Rows of norm 1."""
    rows = torch.randn(*shape, dtype=torch.float64)
    return rows / rows.norm(dim=-1, keepdim=True)


def sketch(rows: Tensor, numbers: int, seed: int) -> Tensor:
    """S u for rows [C, P] of norm 1, as one sample."""
    sums = torch.zeros(len(rows), numbers, dtype=torch.float64)
    response_sketch(rows[None], sums, seed, 0)
    return sums


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
@pytest.mark.parametrize("start", [0, 7, 2**32 - 3, 2**40])
def test_signs_are_those_of_the_oracle_from_any_place(seed, start):
    want = [reference.sign_ref(seed, start + j) for j in range(9)]
    assert signs(seed, start, 9, CPU).tolist() == want
    assert signs(seed, start + 4, 5, CPU).tolist() == want[4:]


def test_signs_look_like_coins():
    """Sums of signs, and of products of signs that lie apart or have another seed, are those of independent ones."""
    count, lags = 1 << 16, (1, 2, 3, 7, 16, 49, 257, 4097)
    limit = hoeffding(count, looks=1 + len(lags) + 64)
    first = signs(0, 0, count, CPU)
    assert abs(float(first.sum())) < limit
    for lag in lags:
        assert abs(float(first @ signs(0, lag, count, CPU))) < limit, lag
    for bit in range(64 - 1):
        assert abs(float(first @ signs(1 << bit, 0, count, CPU))) < limit, bit


@pytest.mark.parametrize("numbers", [1, 3, 8])
def test_the_product_of_sketches_is_unbiased(numbers):
    """Its mean over many seeds lies within 6 standard errors of <u, v>; the variance is known from the definition."""
    torch.manual_seed(0)
    u, v = units(2, 30)
    products = u * v
    bucket = torch.arange(30) % numbers
    variance = sum(
        float(
            u[b].square().sum() * v[b].square().sum()
            + products[b].sum() ** 2
            - 2 * products[b].square().sum()
        )
        for b in (bucket == k for k in range(numbers))
    )
    seeds = 4000
    found = torch.stack([sketch(torch.stack([u, v]), numbers, seed).prod(0).sum() for seed in range(seeds)])
    assert abs(float(found.mean() - products.sum())) < 6 * math.sqrt(variance / seeds)
    spread = float((found - products.sum()).square().mean()) / variance
    assert abs(spread - 1) < 6 * float((found - found.mean()).square().std()) / variance / math.sqrt(seeds)


@pytest.mark.parametrize("turn", [1e-3, 1e-1])
def test_the_difference_errs_by_a_share_of_what_it_estimates(turn):
    """The standard deviation of |S (u - v)|^2 is sqrt(2 / r) |u - v|^2 where the buckets hold equal shares of it."""
    torch.manual_seed(0)
    numbers, seeds = 8, 1000
    u = units(1, 400)
    v = u + turn * units(1, 400)
    v /= v.norm()
    want = float((u - v).square().sum())
    found = torch.tensor(
        [float((sketch(u, numbers, s) - sketch(v, numbers, s)).square().sum()) for s in range(seeds)]
    )
    energy = torch.stack([(u - v)[:, b::numbers].square().sum() for b in range(numbers)])
    deviation = math.sqrt(2 * float(energy.square().sum()))  # less the fourth powers
    assert abs(float(found.mean()) - want) < 6 * deviation / math.sqrt(seeds)
    assert float(found.std()) < deviation * (1 + 6 / math.sqrt(seeds)) < 0.7 * want


def test_with_enough_numbers_a_sketch_is_exact(model):
    """Every value has a number of its own: all layers, calls and axes, against the exact meter."""
    probe = torch.randn(4, 3, 5, 5)
    for axis in ("out", "in"):
        exact, meter = ResponseMeter(torch.float64), SketchMeter(4 * 26, torch.float64)
        for seed in (1, 2, 3):
            edit(model, seed)
            want, got = (m.measure(model, shapes(model, axis), axis, probe) for m in (exact, meter))
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=0, atol=4 * 104 * EPS, msg=name)
        assert meter.unmeasured == exact.unmeasured == ("unused",)
        assert len(meter.shapes["hidden"]) == 2


@pytest.mark.parametrize("shape", [(2, 5, 64, 64), (10, 960, 4, 4), (1, 1, 70000)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape):
    new, before, found = torch.randn(shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 3):
            torch.set_num_threads(threads)
            found.append(torch.zeros(shape[1], 16, dtype=torch.float64))
            response_sketch(new, found[-1], 3, 5)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_zero_responses():
    """METHOD 1.1: both zero 1, one zero 0, in a mean over samples of both kinds; two calls continue one vector."""
    conv = sb.SparseConv2d(1, 4, 1, bias=False)
    probe = (
        torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 2, 3)
    )  # the second sample is zero everywhere
    for numbers, tolerance in ((14, 4 * 14 * EPS), (1, 0.0)):
        meter = SketchMeter(numbers, torch.float64)
        for weight in ([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, -2.0]):
            with torch.no_grad():
                conv.weight.copy_(torch.tensor(weight).view(4, 1, 1, 1))
            phi = meter.measure(conv, {"conv": (conv, 4)}, "out", probe)["conv"]
        assert phi[0] == 1.0
        if numbers == 14:
            torch.testing.assert_close(
                phi, torch.tensor([1.0, 0.5, 0.5, 0.0]).double(), rtol=0, atol=tolerance
            )


def test_an_unchanged_model_has_no_velocity(model):
    probe, meter = torch.randn(2, 3, 5, 5), SketchMeter(4)
    for _ in range(3):
        phi = meter.measure(model, shapes(model, "out"), "out", probe)
    assert all(bool((values == 1).all()) for values in phi.values())


def test_bytes_depend_on_channels_alone(model):
    channels = shapes(model, "out")
    called = sum(count for name, (_, count) in channels.items() if name != "unused")
    for storage in (torch.float16, torch.float32):
        for probe in (torch.randn(1, 3, 5, 5), torch.randn(7, 3, 9, 12)):
            meter = SketchMeter(6, storage)
            meter.measure(model, channels, "out", probe)
            assert meter.bytes == called * 6 * storage.itemsize


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_moves_the_root_of_the_distance_by_no_more_than_it_turns(model, storage):
    """| |a - b| - |a' - b'| | <= |a - a'| + |b - b'| <= eps / 2 (|a| + |b|), a and b being the sketches."""
    probe = torch.randn(3, 3, 5, 5)
    exact, small = SketchMeter(16, torch.float64, seed=3), SketchMeter(16, storage, seed=3)
    for seed in (1, 2):
        edit(model, seed)
        before = copy.deepcopy(exact.kept)
        want, got = (m.measure(model, shapes(model, "out"), "out", probe) for m in (exact, small))
    for name, old in before.items():
        samples = sum(shape[0] for shape in exact.shapes[name])
        bound = torch.finfo(storage).eps / 2 * (old.norm(dim=1) + exact.kept[name].norm(dim=1))
        moved = ((1 - want[name]).clamp(min=0).sqrt() - (1 - got[name]).clamp(min=0).sqrt()).abs()
        assert bool((moved * math.sqrt(2 * samples) <= bound * (1 + 1e-9)).all()), name


def test_low_precision_models(model):
    probe = torch.randn(3, 3, 5, 5, dtype=torch.bfloat16)
    model.bfloat16()
    exact, meter = ResponseMeter(torch.float64), SketchMeter(3 * 26, torch.float64)
    for seed in (1, 2):
        edit(model, seed)
        want, got = (m.measure(model, shapes(model, "out"), "out", probe) for m in (exact, meter))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=4 * 78 * EPS, msg=name)


def test_a_failed_measurement_changes_nothing(model):
    channels, probe, meter = shapes(model, "out"), torch.randn(2, 3, 5, 5), SketchMeter(4)
    meter.measure(model, channels, "out", probe)
    before = meter.state_dict()
    with pytest.raises(ValueError, match=r"'conv'.*\(3, 6, 5, 5\).*\(2, 6, 5, 5\)"):
        meter.measure(model, channels, "out", torch.randn(3, 3, 5, 5))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"'conv'.*diverged"):
            meter.measure(model, channels, "out", probe * bad)
    for key, value in before["kept"].items():
        assert_same_bits(meter.kept[key], value, key)
    assert meter.shapes == before["shapes"]
    edit(model, 1)
    again = SketchMeter(4)
    again.load_state_dict(before)
    one, two = (m.measure(model, channels, "out", probe) for m in (meter, again))
    for name in one:
        assert_same_bits(one[name], two[name], name)


@pytest.mark.parametrize(
    ("kwargs", "words"), [({"numbers": 0}, "numbers"), ({"storage": torch.int8}, "storage")]
)
def test_a_sketch_refuses(kwargs, words):
    with pytest.raises(ValueError, match=words):
        SketchMeter(**kwargs)


def test_a_state_is_checked(model):
    channels, meter = shapes(model, "out"), SketchMeter(4)
    meter.measure(model, channels, "out", torch.randn(2, 3, 5, 5))
    state, counts = meter.state_dict(), {name: count for name, (_, count) in channels.items()}
    meter.check_state(state, counts)
    exact = ResponseMeter(torch.float16)
    bad = [
        ({}, "no responses"),
        (exact.state_dict(), "measure 'exact'.*'sketch'"),
        (SketchMeter(5).state_dict(), "numbers 5.*4"),
        (SketchMeter(4, torch.float32).state_dict(), "storage 'float32'"),
        ({**state, "seed": None}, "seed"),
        ({**state, "shapes": None}, "shapes"),
        ({**state, "shapes": {}}, "'conv'"),
        ({**state, "kept": {"x": torch.zeros(1, 4, dtype=torch.float16)}}, "'x'"),
        ({**state, "kept": {"conv": torch.zeros(7, 4, dtype=torch.float16)}}, "'conv'"),
        ({**state, "kept": {"conv": torch.zeros(6, 4)}}, "'conv'"),
    ]
    for broken, words in bad:
        with pytest.raises(ValueError, match=words):
            meter.check_state(broken, counts)
    with pytest.raises(ValueError, match=r"measure 'sketch'.*'exact'"):
        exact.check_state(state, counts)
