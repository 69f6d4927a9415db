"""Every operator of `torch.ops.sparse_bwd` against its eager oracle, the oracle against autograd, and both schemas.

The values are small integers, so that every sum is exact and "equal" means the same bits in any order of summation.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_bwd as sb
from benchmarks.masked import is_depthwise
from sparse_bwd.ops import backend, bits, reference, response
from sparse_bwd.ops.conv2d_dw import kept_input, make_plan
from sparse_bwd.ops.write_back import read_slices
from tests.cases import AXES, CONV_CASES, LAYOUTS, SELECTIONS, Case
from tests.tolerance import assert_same_bits

OPS = torch.ops.sparse_bwd
OPERATORS = (
    "linear_dw",
    "conv2d_dw",
    "affine_act",
    "affine_act_",
    "affine_act_dx",
    "max_pool2d",
    "max_pool2d_dx",
    "norm_affine",
    "response",
    "response_sketch",
    "write_back",
)
BATCHED = [case for case in CONV_CASES if len(case.shape) == 4 and case.dtype is torch.float32]


def integers(*shape: int, largest: int = 2) -> Tensor:
    """A float32 tensor of small integers."""
    return torch.randint(-largest, largest + 1, shape).float()


@pytest.fixture(params=["plain", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Plain PyTorch alone, and native kernels wherever they serve a call."""
    if request.param == "native" and backend.missing("cpu"):
        pytest.skip(backend.missing("cpu"))
    with backend.forced("plain" if request.param == "plain" else None):
        yield


def check(operator: Any, *arguments: Any) -> None:
    """Schema, fake, tracing and missing autograd formula of one call."""
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered_with_a_fake(name: str) -> None:
    operator = getattr(OPS, name).default
    assert operator._schema.name == f"sparse_bwd::{name}"
    assert torch._library.simple_registry.singleton.find(f"sparse_bwd::{name}").fake_impl.kernel is not None


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 1 << 18])
def test_bits_and_their_tail(count: int) -> None:
    flags = torch.rand(count) < 0.5
    packed = torch.full((bits.packed_size(count),), 255, dtype=torch.uint8)
    bits.pack(flags, packed)
    assert torch.equal(bits.unpack(packed, count), flags)
    for i in range(min(count, 20)):
        assert bool(int(packed[i // 8]) >> (i % 8) & 1) == bool(flags[i])
    if count % 8:
        assert int(packed[-1]) >> (count % 8) == 0, "bits past the end must be zero"


@pytest.mark.parametrize("rows", [None, [1], [0, 2, 4]], ids=str)
@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7), (7,), (0, 7)], ids=str)
def test_linear_dw(shape: tuple[int, ...], rows: list[int] | None) -> None:
    x, dy = integers(*shape), integers(*shape[:-1], 5)
    weight, bias = integers(5, 7).requires_grad_(), integers(5).requires_grad_()
    F.linear(x, weight, bias).backward(dy)
    index = None if rows is None else torch.tensor(rows)
    picked = slice(None) if rows is None else rows
    dw, db = OPS.linear_dw(x, dy, index, True)
    for actual, oracle, dense in zip(
        (dw, db), reference.linear_dw_ref(x, dy, index), (weight.grad, bias.grad), strict=True
    ):
        assert_same_bits(oracle, dense[picked], "oracle")
        assert_same_bits(actual, oracle)
    assert OPS.linear_dw(x, dy, index, False)[1].numel() == 0
    check(OPS.linear_dw.default, x, dy, index, True)


@pytest.mark.parametrize("selection", ["one", "some", "whole"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.id)
def test_conv2d_dw(case: Case, axis: str, selection: str) -> None:
    layer, stock = sb.SparseConv2d(*case.sizes, **case.options), case.stock()
    geometry, groups = layer._geometry, stock.groups
    axis = "out" if is_depthwise(stock) else axis
    chosen = SELECTIONS[selection](layer.num_channels(axis))
    index = None if chosen is None else torch.tensor(chosen)
    x = LAYOUTS[case.layout](integers(*case.shape, largest=1))
    with torch.no_grad():
        stock.weight.copy_(integers(*stock.weight.shape, largest=1))
    dy = integers(*stock(x).shape, largest=1)
    leaf = x.detach().requires_grad_()
    stock(leaf).backward(dy)
    if x.numel():
        dx, dw, db = reference.conv2d_bwd_ref(x, stock.weight, dy, geometry)
        assert_same_bits(dx, leaf.grad, "dx of the oracle")
        assert_same_bits(dw, stock.weight.grad, "dw of the oracle")
        assert stock.bias is None or torch.equal(db, stock.bias.grad)
    dim, split = (0, 1) if axis == "out" else (1, groups)
    expected = read_slices(stock.weight.grad, index, dim, split)
    plan = make_plan(index, axis, stock.in_channels, stock.out_channels, groups)
    arguments = (
        kept_input(x, plan.keep), dy, plan.spread, plan.rows, plan.pick, list(expected.shape), geometry.stride,
        geometry.padding, geometry.padding_mode, geometry.dilation, plan.groups, axis == "in" and groups > 1,
    )  # fmt: skip
    assert_same_bits(OPS.conv2d_dw(*arguments), expected, "dw")
    if x.numel():
        assert_same_bits(
            reference.conv2d_dw_ref(x, dy, stock.weight, index, axis, geometry), expected, "oracle"
        )
    if case.id in ("plain", "groups", "depthwise", "reflect", "channels_last"):
        check(OPS.conv2d_dw.default, *arguments)


ACTS = [("none", 0.0, 0.0), ("relu", 0.0, 0.0), ("hardtanh", -1.0, 2.0), ("leaky_relu", 0.25, 0.0)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 8, 1, 1), (3, 5, 7, 3), (0, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["bare", "affine"])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act[0])
def test_affine_act(act: tuple[str, float, float], affine: bool, shape: tuple[int, ...], layout: str) -> None:
    x = LAYOUTS[layout](integers(*shape, largest=4))
    scale, shift = (integers(shape[1]), integers(shape[1])) if affine else (None, None)
    expected = reference.affine_act_ref(x, scale, shift, *act)
    y, mask = OPS.affine_act(x, scale, shift, *act, True)
    assert_same_bits(y, expected, "y")
    assert mask.numel() == (0 if act[0] == "none" else bits.packed_size(x.numel()))
    assert OPS.affine_act(x, scale, shift, *act, False)[1].numel() == 0
    held = x.clone(memory_format=torch.preserve_format)
    assert_same_bits(OPS.affine_act_(held, scale, shift, *act, True), mask, "mask in place")
    assert_same_bits(held, expected, "y in place")
    for dy in (integers(*shape), LAYOUTS["channels_last"](integers(*shape)), torch.ones(()).expand(shape)):
        dx, dshift = reference.affine_act_bwd_ref(x, scale, shift, dy, *act)
        arguments = (dy, scale, mask if act[0] != "none" else None, act[0], act[1], y.stride(), affine)
        our_dx, our_dshift = OPS.affine_act_dx(*arguments)
        assert_same_bits(our_dx, dx, "dx")
        assert our_dx.stride() == y.stride()
        if affine:
            assert_same_bits(our_dshift, dshift, "dshift")
    if layout in ("contiguous", "channels_last") and shape == (2, 3, 4, 5):
        check(OPS.affine_act.default, x, scale, shift, *act, True)
        check(OPS.affine_act_.default, held, scale, shift, *act, True)
        check(OPS.affine_act_dx.default, *arguments)


def test_affine_act_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of many blocks, none of which divides it, gives what one block gives."""
    from sparse_bwd.ops import affine_act as module

    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](integers(5, 7, 11, 3))
        dy, scale, shift = integers(5, 7, 11, 3), integers(7), integers(7)
        for vectors in ((scale, shift), (None, None)):
            monkeypatch.setattr(module, "BLOCK", 1 << 18)
            y, mask = OPS.affine_act(x, *vectors, "relu", 0.0, 0.0, True)
            dx, _ = OPS.affine_act_dx(dy, vectors[0], mask, "relu", 0.0, y.stride(), False)
            monkeypatch.setattr(module, "BLOCK", 64)
            for one, two in zip(OPS.affine_act(x, *vectors, "relu", 0.0, 0.0, True), (y, mask), strict=True):
                assert_same_bits(one, two)
            again, _ = OPS.affine_act_dx(dy, vectors[0], mask, "relu", 0.0, y.stride(), False)
            assert_same_bits(again, dx)


POOLS = [
    ((2, 3, 6, 8), [2, 2], [2, 2], [0, 0], [1, 1], False),
    ((2, 3, 7, 9), [3, 2], [2, 1], [1, 0], [1, 2], False),
    ((1, 2, 5, 6), [2, 2], [2, 2], [1, 1], [1, 1], True),
    ((3, 1, 20, 20), [16, 16], [3, 3], [0, 0], [1, 1], False),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_max_pool2d(pool: tuple[Any, ...], layout: str) -> None:
    shape, *window = pool
    x = LAYOUTS[layout](integers(*shape))
    y, offset = OPS.max_pool2d(x, *window)
    expected, place = reference.max_pool2d_ref(x, *window)
    assert_same_bits(y, expected, "y")
    assert offset.dtype is torch.uint8 and torch.equal(offset.long(), place)
    dy = integers(*y.shape)
    arguments = (dy, offset, list(shape), *window)
    assert_same_bits(OPS.max_pool2d_dx(*arguments), reference.max_pool2d_bwd_ref(x, dy, *window), "dx")
    check(OPS.max_pool2d.default, x, *window)
    check(OPS.max_pool2d_dx.default, *arguments)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4), (2, 4, 7), (0, 4, 5, 5)], ids=str)
def test_response(shape: tuple[int, ...], stored: torch.dtype) -> None:
    new, previous = integers(*shape), integers(*shape).to(stored)
    expected = reference.response_ref(new, previous)
    by_hand = (new.double() * previous.double()).flatten(2).sum(2) if len(shape) > 2 else new * previous
    assert torch.equal(expected[0], by_hand.double())
    for layout in ("contiguous", "channels_last"):
        if layout == "channels_last" and len(shape) != 4:
            continue
        held = LAYOUTS[layout](previous.clone())
        results = OPS.response(LAYOUTS[layout](new), held)
        for name, actual, oracle in zip(("dot", "new", "old"), results, expected, strict=True):
            assert_same_bits(actual, oracle, name)
        assert_same_bits(held, new.to(stored), "stored response")
    check(OPS.response.default, new, previous)


@pytest.mark.parametrize("chosen", [[1], [0, 2, 3], []], ids=str)
def test_response_of_selected_channels(chosen: list[int]) -> None:
    channels = torch.tensor(chosen, dtype=torch.int64)
    new, previous = integers(3, 4, 5, 6), integers(3, len(chosen), 5, 6)
    expected = torch.stack(reference.response_ref(new[:, channels], previous))
    for layout in ("contiguous", "channels_last"):
        held = LAYOUTS[layout](previous.clone())
        sums = response(LAYOUTS[layout](new), held, channels)
        assert_same_bits(sums, expected, layout)
        assert_same_bits(held, new[:, channels], "stored response")
    check(OPS.response.default, new, previous, channels)


def units(*shape: int) -> Tensor:
    """Signs on 4 or 16 positions of every sample and channel, zero elsewhere: norms are powers of two; some are 0."""
    places = math.prod(shape[2:])
    rows = torch.zeros(shape[0] * shape[1], places)
    for number, row in enumerate(rows):
        chosen = torch.randperm(places)[: (0, 4, 16)[number % 3] if places >= 16 else number % 2]
        row[chosen] = integers(len(chosen)).sign() + 0.0
        row[chosen[row[chosen] == 0]] = 1.0
    return rows.view(shape)


@pytest.mark.parametrize("numbers", [1, 5, 16, 300])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 5, 17), (3, 4), (1, 3, 1), (0, 4, 5, 5)], ids=str)
def test_response_sketch(shape: tuple[int, ...], numbers: int) -> None:
    new, start, seed = units(*shape), 2**32 - 20, 2**40 + 3
    held = integers(shape[1], numbers).double()
    expected = reference.response_sketch_ref(new, held, seed, start)
    for layout in LAYOUTS if len(shape) == 4 and new.numel() else ("contiguous",):
        for dtype in (torch.float32, torch.bfloat16):
            sums = held.clone()
            OPS.response_sketch(LAYOUTS[layout](new).to(dtype), sums, seed, start)
            assert_same_bits(sums, expected, f"{layout} {dtype}")
    check(OPS.response_sketch.default, new, held, seed, start)


@pytest.mark.parametrize("affine", [False, True])
def test_norm_affine(affine: bool) -> None:
    """Powers of two and four, so that roots and products are exact."""
    mean, variance = integers(5), torch.tensor([0.25, 1.0, 4.0, 16.0, 0.0625])
    weight, bias = (integers(5), integers(5)) if affine else (None, None)
    scale, shift = OPS.norm_affine(mean, variance, weight, bias, 0.0)
    ends = [F.batch_norm(torch.full((1, 5), x), mean, variance, weight, bias, eps=0.0)[0] for x in (0.0, 1.0)]
    assert_same_bits(shift, ends[0])
    assert_same_bits(scale, ends[1] - ends[0])
    half = OPS.norm_affine(mean.bfloat16(), variance.bfloat16(), None, None, 0.0)
    assert all(vector.dtype is torch.float32 for vector in half)
    check(OPS.norm_affine.default, mean, variance, weight, bias, 0.0)


SLOTS = [(0, 1, 6), (1, 1, 4), (1, 2, 8)]


@pytest.mark.parametrize("chosen", [None, [1], [0, 2, 3]], ids=str)
def test_write_back(chosen: list[int] | None) -> None:
    """All kinds of slots in one call, each against the loop of the oracle; reading is the inverse of writing."""
    index = None if chosen is None else torch.tensor(chosen)
    fulls = [integers(6, 4, 3, 3, largest=100) for _ in SLOTS]
    parts = [
        integers(*read_slices(full, index, dim, groups).shape)
        for full, (dim, groups, _) in zip(fulls, SLOTS, strict=True)
    ]
    dims, groups = [dim for dim, _, _ in SLOTS], [groups for _, groups, _ in SLOTS]
    expected = [
        reference.write_back_ref(full, part, index, dim, g)
        for full, part, dim, g in zip(fulls, parts, dims, groups, strict=True)
    ]
    OPS.write_back(fulls, parts, [index] * len(SLOTS), dims, groups)
    for full, part, oracle, dim, g in zip(fulls, parts, expected, dims, groups, strict=True):
        assert_same_bits(full, oracle, f"dim {dim} groups {g}")
        assert_same_bits(read_slices(full, index, dim, g), part, "read back")
    check(OPS.write_back.default, fulls, parts, [index] * len(SLOTS), dims, groups)
