"""affine_act in Triton: values and flags bit by bit those of plain PyTorch, and near the oracle.

The inputs are small multiples of 1/8, whose products and sums are exact in any order, with NaN, infinities, zeros of
both signs and the very bounds of the activations among them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend, bits
from sparse_bwd.ops.affine_act import affine_act, affine_act_, affine_act_dx
from sparse_bwd.ops.reference import affine_act_bwd_ref, affine_act_ref
from sparse_bwd.ops.triton import affine_act as kernels
from sparse_bwd.ops.triton.launch import recorded
from tests.cuda_host.checks import eighths, laid_out
from tests.tolerance import assert_same_bits
from tests.triton.drive import DTYPES, assert_near, config, values

pytestmark = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # numpy of what NaN and infinities do
ACTS = [
    ("none", 0.0, 0.0),
    ("relu", 0.0, 0.0),
    ("hardtanh", 0.0, 6.0),
    ("hardtanh", -1.0, 1.5),
    ("leaky_relu", 0.125, 0.0),
]
# Planes of 1 to 49 elements; 1, 8, 24 and other channels; enough images for several splits; [N, C] of a Linear.
SHAPES = [
    (1, 1, 1, 1), (2, 33, 1, 1), (3, 5, 7, 7), (2, 8, 4, 4), (2, 16, 3, 5), (2, 3, 2, 3), (9, 3, 7, 7), (5, 10),
    (9, 24),
]  # fmt: skip
LAYOUTS = ["contiguous", "channels_last"]
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 6.0, -1.0, 1.5]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every shape crosses their edges."""
    config(monkeypatch, "affine_act", {"ELEMENTS": 256})
    config(monkeypatch, "affine_act_dx", {"ELEMENTS": 256})
    config(monkeypatch, "affine_act_shift", {"ELEMENTS": 64})


def special(*shape: int, dtype: torch.dtype) -> Tensor:
    """Multiples of 1/8, some of them replaced by what a comparison may go wrong on."""
    x = eighths(*shape, most=64)
    for number in SPECIAL:
        x = torch.where(torch.rand(shape) < 0.04, number, x)
    return x.to(dtype)


def plain(operator: Any, *arguments: Any) -> Any:
    with backend.forced("plain"):
        return operator(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_values_and_flags(
    act: tuple[str, float, float], layout: str, dtype: torch.dtype, device: str
) -> None:
    for shape in SHAPES:
        x = laid_out(special(*shape, dtype=dtype), layout).to(device)
        scale, shift = eighths(2, shape[1], most=8).to(device)
        check_forward(x, scale, shift, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=str)
def test_without_a_norm(act: tuple[str, float, float], dtype: torch.dtype, device: str) -> None:
    for shape in [(3, 5, 7, 7), (5, 10), (77,)]:
        x = special(*shape, dtype=dtype).to(device)
        check_forward(x, None, None, act)
        bare, none = affine_act(x, None, None, *act, False)
        assert_same_bits(bare, plain(affine_act, x, None, None, *act, False)[0])
        assert none.numel() == 0


def check_forward(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, act: tuple[str, float, float]
) -> None:
    """y and its flags, also in place."""
    arguments = (scale, shift, *act, True)
    y, mask = affine_act(x, *arguments)
    want, flags = plain(affine_act, x, *arguments)
    wide = [None if v is None else v.double() for v in (scale, shift)]
    assert_same_bits(y, want, f"y {x.shape}")
    assert_same_bits(y, affine_act_ref(x.double(), *wide, *act).to(x.dtype), f"oracle {x.shape}")
    assert_same_bits(mask, flags, f"flags {x.shape}")
    assert y.stride() == x.stride()
    assert_same_bits(affine_act_(x, *arguments), mask, "flags in place")
    assert_same_bits(x, y, "in place")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", [ACTS[0], ACTS[1], ACTS[4]], ids=str)
def test_gradient(act: tuple[str, float, float], layout: str, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        dy = laid_out(special(*shape, dtype=dtype), layout).to(device)
        check_backward(dy, eighths(shape[1], most=8).to(device), act, dy)


@pytest.mark.parametrize("act", [ACTS[0], ACTS[1], ACTS[4]], ids=str)
def test_gradient_in_other_layouts_and_without_a_norm(act: tuple[str, float, float], device: str) -> None:
    dy = special(3, 5, 7, 7, dtype=torch.float32).to(device)
    for like in (dy, laid_out(dy, "channels_last")):
        for incoming in (laid_out(dy, "channels_last"), dy[:, :1].expand(dy.shape), dy):
            check_backward(incoming, None, act, like)
            check_backward(incoming, eighths(5, most=8).to(device), act, like)
    check_backward(dy.flatten(), None, act, dy.flatten())


def check_backward(dy: Tensor, scale: Tensor | None, act: tuple[str, float, float], like: Tensor) -> None:
    """dx and dshift, for random flags; `like` has the strides of dx."""
    mask = torch.randint(0, 256, (bits.packed_size(dy.numel()),), dtype=torch.uint8, device=dy.device)
    kept = None if act[0] == "none" else mask
    for with_shift in (False, True)[: dy.dim()]:
        arguments = (dy, scale, kept, act[0], act[1], like.stride(), with_shift)
        dx, dshift = affine_act_dx(*arguments)
        want, total = plain(affine_act_dx, *arguments)
        assert_same_bits(dx, want, f"dx {dy.shape}")
        assert dx.stride() == like.stride()
        if act[0] == "relu":  # plain PyTorch has -0 for some of them
            blocked = bits.unpack(mask, dx.numel()).as_strided(dx.shape, dx.stride())
            assert not (dx.signbit() & blocked).any()
        assert_same_bits(dshift, total, f"dshift {dy.shape}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(dtype: torch.dtype, layout: str, device: str) -> None:
    for act in ACTS:
        x = laid_out(eighths(3, 8, 5, 3, dtype=dtype) + 1 / 16, layout).to(device)  # nowhere a kink
        scale, shift = eighths(2, 8, most=4).to(device)
        dy = laid_out(values(3, 8, 5, 3, dtype=dtype), layout).to(device)
        _, mask = affine_act(x, scale, shift, *act, True)
        wide = [v.double() for v in (x, scale, shift)]
        want = affine_act_bwd_ref(*wide, dy.double(), *act)
        for with_shift in (False, True):
            kept = mask if mask.numel() else None
            dx, dshift = affine_act_dx(dy, scale, kept, act[0], act[1], x.stride(), with_shift)
            assert_near(dx, want[0], values)
        assert_near(dshift, want[1], values)


def test_an_infinite_scale_leaves_zeros_where_nothing_passes(device: str) -> None:
    dy, scale = values(2, 3, 4, 4, device=device), torch.full((3,), float("inf"), device=device)
    mask = torch.full((12,), 0xFF, dtype=torch.uint8, device=device)
    for with_shift in (False, True):
        dx, _ = affine_act_dx(dy, scale, mask, "relu", 0.0, dy.stride(), with_shift)
        assert_same_bits(dx, torch.zeros_like(dx))


def test_the_same_bits_every_time(device: str) -> None:
    for layout in LAYOUTS:
        dy = laid_out(values(40, 3, 7, 7), layout).to(device)
        first = affine_act_dx(dy, None, None, "none", 0.0, dy.stride(), True)
        again = affine_act_dx(dy.clone(), None, None, "none", 0.0, dy.stride(), True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_sums_are_split_where_there_are_many_images() -> None:
    for layout in LAYOUTS:
        dy = laid_out(torch.empty(128, 64, 28, 28, device="meta"), layout)
        with recorded("sm_90") as launches:
            kernels.affine_act_dx(dy, None, None, "none", 0.0, dy.stride(), True)
        assert [launch.kernel.__name__ for launch in launches][1:] == ["add_splits"]
        assert launches[0].grid[0] * launches[0].grid[1] >= 132


def test_others_serve_what_it_cannot(device: str) -> None:
    x, vector = values(4, 3, 2, 2, device=device), values(3, device=device)
    none = (None, None, "relu", 0.0, 0.0, True)
    huge = torch.empty(1, 2**30 + 8, device="meta")
    assert kernels.affine_act(huge, *none) is NotImplemented
    calls = [(bad, *none) for bad in (x.double(), x[:0], x[:, 1:], x[..., ::2])]
    calls += [(x, vector, None, *none[2:]), (x, vector.half(), vector, *none[2:])]
    for call in calls:
        for operator in (affine_act, affine_act_):
            with pytest.raises(NotImplementedError, match="triton"):
                operator(*call)
    with pytest.raises(NotImplementedError, match="triton"):
        affine_act_dx(x.double(), None, None, "none", 0.0, x.stride(), False)
