"""The native CPU kernels against the oracles: every operator, dtype, layout and instruction set of this processor.

Every operator runs under `forced("native")`, which raises where plain PyTorch would serve instead. Small integers must
come out with the oracle's bits; random values are judged by the error of plain PyTorch in the same dtype.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparse_bwd as sb
from benchmarks.masked import is_depthwise
from sparse_bwd.ops import bits, reference
from sparse_bwd.ops.backend import forced, native
from sparse_bwd.ops.conv2d_dw import kept_input, make_plan
from sparse_bwd.ops.write_back import read_slices
from tests.cases import AXES, CONV_CASES, LAYOUTS, SELECTIONS, Case
from tests.native_calls import ACTS, OPS, USABLE, choose, integers, needs_native
from tests.tolerance import assert_close_to_oracle, assert_same_bits

# One element, one pixel, one channel, vectors that end inside, at and after a register, planes that share a byte of
# flags, more channels than a table repeats, and a tensor that is cut into several pieces.
SHAPES = [
    (1, 1, 1, 1), (2, 33, 1, 1), (3, 1, 5, 7), (2, 3, 5, 7), (1, 7, 3, 3), (2, 8, 4, 4), (1, 15, 2, 9), (2, 16, 3, 5),
    (1, 17, 7, 1), (3, 31, 1, 2), (2, 64, 7, 7), (2, 5, 131, 67),
]  # fmt: skip
pytestmark = needs_native
DTYPES = [torch.float32, torch.bfloat16]
DENSE = ["contiguous", "channels_last"]


@pytest.fixture(params=USABLE, autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set in turn; the widest again afterwards."""
    choose(request.param)
    with forced("native"):
        yield request.param
    choose("")


def values(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Random values with every kind of number that a comparison may go wrong on."""
    x = torch.randn(shape)
    special = torch.tensor([0.0, -0.0, -1.0, 2.0, float("inf"), -float("inf"), float("nan")])
    if x.numel() > 64:
        x.view(-1)[torch.randperm(x.numel())[: len(special)]] = special
    return LAYOUTS[layout](x.to(dtype))


def flags_of(y: Tensor, act: tuple[str, float, float]) -> Tensor:
    """The flags that belong to the results of an activation, in storage order; y is dense."""
    name, low, high = act
    marks = {"relu": y <= 0, "hardtanh": (y <= low) | (y >= high), "leaky_relu": y > 0}[name]
    packed = torch.zeros(bits.packed_size(y.numel()), dtype=torch.uint8)
    bits.pack(marks.as_strided((y.numel(),), (1,)), packed)
    return packed


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act[0])
def test_affine_act(act: tuple[str, float, float], dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        x, (scale, shift) = values(shape, dtype, layout), torch.randn(2, shape[1])
        for vectors in ((scale, shift), (None, None)):
            wide = [v if v is None else v.double() for v in vectors]
            oracle = reference.affine_act_ref(x.double(), *wide, *act)
            with forced("plain"):
                plain, _ = OPS.affine_act(x, *vectors, *act, True)
            y, mask = OPS.affine_act(x, *vectors, *act, True)
            assert_close_to_oracle(y, plain, oracle, f"y {shape}")
            assert y.stride() == x.stride()
            if act[0] != "none":
                assert_same_bits(mask, flags_of(y, act), f"mask {shape}")
            held = x.clone(memory_format=torch.preserve_format)
            assert_same_bits(OPS.affine_act_(held, *vectors, *act, True), mask, "mask in place")
            assert_same_bits(held, y, "y in place")
            bare, none = OPS.affine_act(x, *vectors, *act, False)
            assert_same_bits(bare, y, "y without flags")
            assert none.numel() == 0


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=lambda act: act[0])
def test_affine_act_dx(act: tuple[str, float, float], dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        # Multiples of 1/2 that are nowhere a kink: the oracle, in fp64, is on the same side of it.
        x = LAYOUTS[layout](integers(*shape, dtype=dtype) + 0.5)
        scale, shift = integers(shape[1], largest=1).float() * 2 + 1, torch.zeros(shape[1])
        x, dy = x.clone(memory_format=torch.preserve_format), torch.randn(shape).to(dtype)
        _, mask = OPS.affine_act(x, scale, shift, *act, True)
        for incoming in (LAYOUTS[layout](dy), dy, torch.ones((), dtype=dtype).expand(shape)):
            wide = (x.double(), scale.double(), shift.double(), incoming.double(), *act)
            oracle, oracle_shift = reference.affine_act_bwd_ref(*wide)
            kept = mask if act[0] != "none" else None
            for with_shift in (True, False):
                arguments = (incoming, scale, kept, act[0], act[1], x.stride(), with_shift)
                with forced("plain"):
                    plain, plain_shift = OPS.affine_act_dx(*arguments)
                dx, dshift = OPS.affine_act_dx(*arguments)
                assert_close_to_oracle(dx, plain, oracle, f"dx {shape}")
                assert dx.stride() == x.stride()
                if with_shift:
                    assert_close_to_oracle(dshift, plain_shift, oracle_shift, f"dshift {shape}")


def test_flags_without_a_scale_and_without_flags() -> None:
    """dx of a bare activation, and of an affine map that no activation follows, with its sum."""
    for layout in DENSE:
        dy = LAYOUTS[layout](integers(2, 19, 5, 3))
        mask = torch.randint(0, 256, (bits.packed_size(dy.numel()),), dtype=torch.uint8)
        let = ~bits.unpack(mask, dy.numel())
        expected = dy.clone(memory_format=torch.preserve_format)
        expected.as_strided((dy.numel(),), (1,)).mul_(let)
        dx, _ = OPS.affine_act_dx(dy, None, mask, "relu", 0.0, dy.stride(), False)
        assert_same_bits(dx, expected)
        dx, dshift = OPS.affine_act_dx(dy, None, mask, "relu", 0.0, dy.stride(), True)
        assert_same_bits(dx, expected)
        assert_same_bits(dshift, expected.sum((0, 2, 3)))
        dx, dshift = OPS.affine_act_dx(dy, None, None, "none", 0.0, dy.stride(), True)
        assert_same_bits(dx, dy)
        assert_same_bits(dshift, dy.sum((0, 2, 3)))


WINDOWS = [
    ([2, 2], [2, 2], [0, 0], [1, 1], False), ([3, 3], [2, 2], [1, 1], [1, 1], False),
    ([3, 2], [2, 1], [1, 0], [1, 2], False), ([2, 2], [2, 2], [1, 1], [1, 1], True),
    ([1, 1], [1, 1], [0, 0], [1, 1], False), ([16, 16], [3, 3], [0, 0], [1, 1], False),
]  # fmt: skip


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max_pool2d(window: tuple[Any, ...], dtype: torch.dtype, layout: str) -> None:
    for shape in [(2, 3, 17, 19), (1, 8, 16, 16), (1, 17, 18, 23), (2, 33, 20, 17)]:
        for x in (values(shape, dtype, layout), LAYOUTS[layout](integers(*shape, dtype=dtype))):
            y, offset = OPS.max_pool2d(x, *window)
            expected, place = reference.max_pool2d_ref(x, *window)
            assert_same_bits(y, expected, "y")
            assert torch.equal(offset.long(), place)
            assert y.stride() == expected.contiguous(memory_format=_format(layout)).stride()
            dy = LAYOUTS[layout](torch.randn(y.shape).to(dtype))
            oracle = reference.max_pool2d_bwd_ref(x.double(), dy.double(), *window)
            plain = reference.max_pool2d_bwd_ref(x, dy, *window)
            dx = OPS.max_pool2d_dx(dy, offset, list(shape), *window)
            assert_close_to_oracle(dx, plain, oracle, "dx")
            assert_same_bits(
                OPS.max_pool2d_dx(dy.contiguous(), offset, list(shape), *window), dx, "dx, dy in NCHW"
            )


def _format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def test_max_pool2d_of_nothing_but_infinities_and_nan() -> None:
    for fill in (-float("inf"), float("nan")):
        for layout in DENSE:
            x = LAYOUTS[layout](torch.full((1, 9, 6, 6), fill))
            for window in WINDOWS[:4]:
                y, offset = OPS.max_pool2d(x, *window)
                expected, place = reference.max_pool2d_ref(x, *window)
                assert_same_bits(y, expected)
                assert torch.equal(offset.long(), place)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_response(layout: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    """The integers are so large that sums in float32 would not be exact, while those in float64 are."""
    for shape in SHAPES:
        new, previous = (
            integers(*shape, largest=4000 if t is torch.float32 else 256, dtype=t) for t in (dtype, stored)
        )
        held = LAYOUTS[layout](previous.clone())
        sums = OPS.response(LAYOUTS[layout](new), held)
        assert_same_bits(sums, torch.stack(reference.response_ref(new, previous)), f"sums {shape}")
        assert_same_bits(held, new.to(stored), "stored response")


@pytest.mark.parametrize("shape", [(5, 19), (3, 7, 11), (0, 4), (4, 0), (2, 3, 0)], ids=str)
def test_response_of_features_and_tokens(shape: tuple[int, ...]) -> None:
    new, previous = integers(*shape), integers(*shape)
    expected = torch.stack(reference.response_ref(new, previous))
    assert_same_bits(OPS.response(new, previous), expected)
    assert_same_bits(previous, new)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("channels", [1, 7, 16, 100])
def test_norm_affine(channels: int, affine: bool) -> None:
    mean, variance, weight, bias = (torch.randn(channels) for _ in range(4))
    vectors = (mean, variance.square(), weight if affine else None, bias if affine else None)
    results = OPS.norm_affine(*vectors, 1e-5)
    with forced("plain"):
        plain = OPS.norm_affine(*vectors, 1e-5)
    wide = [v if v is None else v.double() for v in vectors]
    ends = [
        F.batch_norm(torch.full((1, channels), x).double(), *wide, False, 0.0, 1e-5)[0] for x in (0.0, 1.0)
    ]
    for name, actual, other, oracle in zip(
        ("scale", "shift"), results, plain, (ends[1] - ends[0], ends[0]), strict=True
    ):
        assert_close_to_oracle(actual, other, oracle, name)


SERVED = [case for case in CONV_CASES if len(case.shape) == 4 and case.dtype in DTYPES]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.id)
def test_conv2d_dw(case: Case) -> None:
    """Depthwise layers are served, in the layouts that are dense; every other call goes to plain PyTorch."""
    layer, stock = sb.SparseConv2d(*case.sizes, **case.options), case.stock().float()
    geometry, depthwise = layer._geometry, stock.groups > 1 and stock.in_channels == stock.groups
    for axis in AXES[:1] if is_depthwise(stock) else AXES:
        for selection in ("one", "some", "whole"):
            chosen = SELECTIONS[selection](layer.num_channels(axis))
            index = None if chosen is None else torch.tensor(chosen)
            x = LAYOUTS[case.layout](integers(*case.shape, largest=1, dtype=case.dtype))
            y = stock(x.float())
            dy = integers(*y.shape, largest=1, dtype=case.dtype).contiguous(
                memory_format=_format(case.layout)
            )
            plan = make_plan(index, axis, stock.in_channels, stock.out_channels, stock.groups)
            dim, split = (0, 1) if axis == "out" else (1, stock.groups)
            expected = read_slices(stock.weight, index, dim, split)
            arguments = (
                kept_input(x, plan.keep), dy, plan.spread, plan.rows, plan.pick, list(expected.shape), geometry.stride,
                geometry.padding, geometry.padding_mode, geometry.dilation, plan.groups, axis == "in" and split > 1,
            )  # fmt: skip
            served = depthwise and plan.groups > 1 and axis == "out"
            if not served:
                with pytest.raises(NotImplementedError, match="sparse_bwd::conv2d_dw has no native kernel"):
                    OPS.conv2d_dw(*arguments)
                continue
            dw = OPS.conv2d_dw(*arguments)
            if x.numel() == 0:
                assert_same_bits(dw, torch.zeros_like(expected, dtype=case.dtype))
                continue
            exact = reference.conv2d_dw_ref(x.float(), dy.float(), stock.weight, index, axis, geometry)
            assert_same_bits(dw, exact.to(case.dtype), f"dw {axis} {selection}")


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "groups,per_in,per_out", [(1, 3, 5), (1, 17, 4), (3, 2, 3), (2, 16, 5), (19, 1, 1), (33, 1, 1)]
)
def test_conv2d_dw_of_groups(groups: int, per_in: int, per_out: int, dtype: torch.dtype, layout: str) -> None:
    """The kernel itself, which knows every number of groups, on values that are not exact."""
    geometry = sb.SparseConv2d(groups * per_in, groups * per_out, 3, 2, 1, groups=groups)._geometry
    x = LAYOUTS[layout](torch.randn(2, groups * per_in, 13, 19).to(dtype))
    dy = LAYOUTS[layout](torch.randn(2, groups * per_out, 7, 10).to(dtype))
    weight = torch.zeros(groups * per_out, per_in, 3, 3)
    oracle = reference.conv2d_bwd_ref(x.double(), weight.double(), dy.double(), geometry)[1]
    plain = reference.conv2d_bwd_ref(x, weight.to(dtype), dy, geometry)[1]
    dw = LAYOUTS[layout](torch.full_like(plain, float("nan")))
    last = layout == "channels_last"
    native("conv2d_dw")(dw, x, dy, None, [2, 2], [1, 1], [1, 1], groups, last)
    assert_close_to_oracle(dw, plain, oracle, "dw")
    if groups == 1:
        rows = torch.tensor([per_out - 1, 0])
        part = LAYOUTS[layout](torch.empty(2, per_in, 3, 3, dtype=dtype))
        native("conv2d_dw")(part, x, dy, rows, [2, 2], [1, 1], [1, 1], 1, last)
        assert_close_to_oracle(part, plain[rows], oracle[rows], "dw of rows")
