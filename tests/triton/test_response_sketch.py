"""response_sketch in Triton against the oracle."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops import response_sketch
from sparse_bwd.ops.reference import response_sketch_ref, sign_ref
from sparse_bwd.ops.triton import response_sketch as kernels
from tests.cases import LAYOUTS
from tests.tolerance import assert_same_bits
from tests.triton.drive import DTYPES, config, values

# One position, fewer and more than a tile holds, several parts; more samples than the second kernel takes at a time.
SHAPES = [(3, 4, 5, 6), (2, 5, 17), (3, 4), (1, 3, 1), (20, 2, 3), (1, 9, 9, 12)]
SEED, START = 2**40 + 3, 2**32 - 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the shapes cross their edges."""
    config(monkeypatch, "response_sketch", {"CHANNELS": 4, "POSITIONS": 16})


def unit_vectors(shape: tuple[int, ...], device: str) -> Tensor:
    """Four signs in every sample and channel, or none, so that norms are 2 or 0 and quotients are exact."""
    places = torch.Size(shape[2:]).numel()
    rows = torch.zeros(shape[0] * shape[1], places)
    for number, row in enumerate(rows):
        if number % 3:
            row[torch.randperm(places)[: 4 if places >= 4 else 1]] = 1.0 - 2.0 * (number % 2)
    return rows.view(shape).to(device)


@triton.jit
def write_signs(out, key, first, count, FAR: tl.constexpr, VALUES: tl.constexpr):
    """Signs of places from `first` on."""
    index = tl.arange(0, VALUES)
    seeded = tl.zeros((1,), dtype=tl.uint32) + tl.cast(key, tl.uint32)
    start = tl.load(first)
    found = kernels.signs(seeded, start + index) if FAR else kernels.signs_near(seeded, start, index)
    tl.store(out + index, found, mask=index < count)


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("seed", [0, 7, SEED, 2**64 - 1, -5])
def test_signs(seed: int, far: bool, device: str) -> None:
    for start in (0, 1, START, 2**33 - 3):
        out = torch.empty(50, device=device)
        first = torch.tensor([start], device=device)
        write_signs[(1,)](out, kernels.key_of(seed), first, 50, FAR=far, VALUES=64)
        assert out.tolist() == [sign_ref(seed, start + i) for i in range(50)]


@pytest.mark.parametrize("numbers", [1, 5, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_response_sketch(shape: tuple[int, ...], dtype: torch.dtype, numbers: int, device: str) -> None:
    held = torch.randint(-2, 3, (shape[1], numbers), device=device).double()
    for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        new = LAYOUTS[layout](unit_vectors(shape, device).to(dtype))
        sums = held.clone()
        response_sketch(new, sums, SEED, START)
        assert_same_bits(sums, response_sketch_ref(new, held, SEED, START), layout)
    new = values(*shape, dtype=dtype, device=device)
    response_sketch(new, sums.copy_(held), SEED, START)
    positions = new.shape[2:].numel()
    error = shape[0] * 2 * kernels.STEPS * 2.0**-24 * max(1.0, positions / numbers) ** 0.5
    torch.testing.assert_close(sums, response_sketch_ref(new, held, SEED, START), rtol=0, atol=error)


def test_parts_and_sums_with_gaps(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(kernels, "STEPS", 2)
    new, held = values(2, 3, 11, 12, device=device), torch.zeros(5, 6, dtype=torch.float64, device=device)
    response_sketch(new, held.t()[:3], 1, 5)
    oracle = response_sketch_ref(new, torch.zeros_like(held.t()[:3]), 1, 5)
    torch.testing.assert_close(held.t()[:3], oracle, rtol=0, atol=1e-5)
    assert not held[:, 3:].any()


def test_what_cannot_be_normalised(device: str) -> None:
    """What diverged must not look like a zero response."""
    for bad in (float("inf"), float("nan"), 1e30):
        new = values(1, 2, 4, 4, device=device)
        new[0, 1, 2, 2] = bad
        sums = torch.zeros(2, 4, dtype=torch.float64, device=device)
        response_sketch(new, sums, 0, 0)
        assert sums.isfinite().all(1).tolist() == [True, False]


def test_the_same_bits_every_time(device: str) -> None:
    new, sums = values(2, 5, 9, 9, device=device), torch.zeros(2, 5, 16, dtype=torch.float64, device=device)
    response_sketch(new, sums[0], 0, 0)
    response_sketch(new.clone(), sums[1], 0, 0)
    assert torch.equal(*sums)


def test_others_serve_what_it_cannot(device: str) -> None:
    x, sums = values(2, 4, 6, 6, device=device), torch.zeros(4, 2000, dtype=torch.float64, device=device)
    for bad, held in (
        (x.double(), sums[:, :3]), (x[:0], sums[:, :3]), (x[..., :3], sums[:, :3]), (x, sums),
        (x, sums[:, :3].float()),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match="triton"):
            response_sketch(bad, held, 0, 0)
