"""response in Triton against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import affine_act_response, response
from sparse_bwd.ops.affine_act import affine_act
from sparse_bwd.ops.layout import take_channels
from sparse_bwd.ops.reference import response_ref
from sparse_bwd.ops.triton import response as kernels
from tests.cases import LAYOUTS
from tests.native_calls import ACTS
from tests.tolerance import assert_same_bits
from tests.triton.drive import DTYPES, config, integers, values

# One value, fewer positions than a tile and several parts; channels fewer, as many and more than a tile has.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (2, 8, 4, 4), (1, 9, 9, 12), (3, 19), (1, 2, 3, 4, 5)]
TILES = [{"CHANNELS": 4, "POSITIONS": 16, "LANES": 1}, {"CHANNELS": 8, "POSITIONS": 32, "LANES": 8}]
# Of |new| |previous|: what the kernel's docstring promises.
ERROR = 2.0**-20


@pytest.fixture(params=TILES, ids=str, autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the shapes cross their edges."""
    config(monkeypatch, "response", request.param)


def layouts(shape: tuple[int, ...]) -> list[str]:
    return ["contiguous", "channels_last"] if len(shape) == 4 else ["contiguous"]


def assert_near(sums: Tensor, new: Tensor, previous: Tensor) -> None:
    dot, now, old = response_ref(new, previous)
    bounds = ((now * old).sqrt(), now, old)
    for actual, oracle, bound in zip(sums, (dot, now, old), bounds, strict=True):
        assert bool(((actual - oracle).abs() <= ERROR * bound).all())


@pytest.mark.parametrize("stored", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_response(shape: tuple[int, ...], dtype: torch.dtype, stored: torch.dtype, device: str) -> None:
    for layout in layouts(shape):
        new = LAYOUTS[layout](integers(*shape, dtype=dtype, device=device))
        held = LAYOUTS[layout](integers(*shape, dtype=stored, device=device))
        expected = torch.stack(response_ref(new, held))
        assert_same_bits(response(new, held), expected, f"sums {layout}")
        assert_same_bits(held, new.to(stored), "stored response")
    new, held = values(*shape, dtype=dtype, device=device), values(*shape, dtype=stored, device=device)
    before = held.clone()
    assert_near(response(new, held), new, before)
    assert_same_bits(held, new.to(stored), "stored response")


@pytest.mark.parametrize("chosen", [[4], [0, 3, 4, 5, 8], list(range(9))], ids=str)
def test_selected_channels(chosen: list[int], device: str) -> None:
    channels = torch.tensor(chosen, device=device)
    for layout in ("contiguous", "channels_last"):
        new = LAYOUTS[layout](integers(3, 9, 5, 7, device=device))
        held = LAYOUTS[layout](integers(3, len(chosen), 5, 7, device=device))
        expected = torch.stack(response_ref(take_channels(new, channels), held))
        assert_same_bits(response(new, held, channels), expected, layout)
        assert_same_bits(held, new[:, channels], "stored response")


def test_two_layouts_and_channels_that_positions_share(device: str) -> None:
    """channels_last against NCHW, and the outputs of a Linear as `channel_view` gives them."""
    new, held = integers(2, 6, 5, 5, device=device), integers(2, 6, 5, 5, device=device)
    pairs = [(new.to(memory_format=torch.channels_last), held)]
    pairs += [(tokens, tokens.roll(1)) for tokens in (integers(2, 50, 9, device=device).movedim(-1, 1),)]
    pairs += [(batch, batch.roll(1)) for batch in (integers(70, 9, device=device).t()[None],)]
    for now, old in pairs:
        expected = torch.stack(response_ref(now, old))
        assert_same_bits(response(now, old), expected)
        assert_same_bits(old, now)


def test_many_parts(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A large plane is split, with the error of a small one; so is a small plane of large values."""
    monkeypatch.setattr(kernels, "PROGRAMS", 64)
    assert kernels.parts_of(100, 3) == 20 and kernels.parts_of(1, 1) == 1
    for layout in ("contiguous", "channels_last"):
        new, held = (LAYOUTS[layout](values(1, 2, 40, 41, device=device) + 1) for _ in range(2))
        before = held.clone()
        assert_near(response(new, held), new, before)
        assert torch.equal(held, new)


def test_equal_and_near_responses(device: str) -> None:
    """Equal ones have a cosine of 1, and the error of a cosine is as small as the change, not as the cosine."""
    old = values(2, 3, 20, 20, device=device)
    sums = response(old, old.clone())
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
    for scale in (1.0, 1.01):
        new = scale * old + 1e-4 * values(2, 3, 20, 20, device=device)
        sums, exact = response(new, old.clone()), torch.stack(response_ref(new, old))
        cosine, expected = (s[0] / (s[1] * s[2]).sqrt() for s in (sums, exact))
        change = float((new - old).norm() / old.norm())
        torch.testing.assert_close(cosine, expected, rtol=0, atol=ERROR * change)
        if scale == 1.0:
            torch.testing.assert_close(1 - cosine, 1 - expected, rtol=1e-4, atol=0)


def test_zero_responses(device: str) -> None:
    zero, one = torch.zeros(1, 2, 5, 5, device=device), values(1, 2, 5, 5, device=device)
    assert not response(zero, zero.clone()).any()
    for now, old in ((zero, one), (one, zero)):
        sums = response(now, old.clone())
        assert not sums[0].any() and bool(sums[1].any()) != bool(sums[2].any())


def test_the_same_bits_every_time(device: str) -> None:
    new, held = values(2, 2, 20, 21, device=device), values(2, 2, 20, 21, device=device)
    assert torch.equal(response(new, held.clone()), response(new.clone(), held.clone()))


def test_others_serve_what_it_cannot(device: str) -> None:
    x = values(2, 4, 6, 6, device=device)
    for bad in (x.double(), x[:0], x[..., :3]):
        with pytest.raises(NotImplementedError, match="triton"):
            response(bad, bad)
    assert kernels.response(x.to(device="meta"), x.int()) is NotImplemented


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act[0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_what_follows(dtype: torch.dtype, act: tuple[str, float, float], device: str) -> None:
    """The sums of `response`, and what `affine_act` makes of the same values."""
    for shape in ((2, 3, 5, 7), (1, 9, 9, 12)):
        for layout in layouts(shape):
            for norm in (True, False):
                x, held = (LAYOUTS[layout](values(*shape, dtype=dtype, device=device)) for _ in range(2))
                vectors = torch.randn(2, shape[1], device=device) if norm else (None, None)
                before, stored = x.clone(), held.clone()
                sums = affine_act_response(x, held, *vectors, *act)
                assert_same_bits(sums, response(before, stored), "sums")
                assert_same_bits(held, before, "stored response")
                assert_same_bits(x, affine_act(before, *vectors, *act, False)[0], "activation")
