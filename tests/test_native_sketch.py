"""The native response_sketch against plain PyTorch and the oracle, on the cases of `response`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import reference
from sparse_bwd.ops.backend import forced
from tests.cases import LAYOUTS
from tests.native_calls import OPS, integers, needs_native
from tests.test_native import DENSE, DTYPES, SHAPES, instructions, values  # noqa: F401  (instructions: a fixture)
from tests.tolerance import assert_same_bits, largest

pytestmark = needs_native
EPS = torch.finfo(torch.float64).eps


def sketches(new: Tensor, sums: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What the native kernel and plain PyTorch make of `sums`."""
    ours, theirs = sums.clone(), sums.clone()
    OPS.response_sketch(new, ours, 7, start)
    with forced("plain"):
        OPS.response_sketch(new, theirs, 7, start)
    return ours, theirs


@pytest.mark.parametrize("numbers", [1, 16, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_response_sketch(layout: str, dtype: torch.dtype, numbers: int) -> None:
    """Sums of integers are exact, and so is what is divided and rounded once; others are judged by the oracle."""
    for shape in SHAPES:
        sums, start = torch.randn(shape[1], numbers, dtype=torch.float64), 2**32 - 20
        whole = integers(*shape, largest=4000 if dtype is torch.float32 else 256, dtype=dtype)
        assert_same_bits(*sketches(LAYOUTS[layout](whole), sums, start), f"integers {shape}")
        new = LAYOUTS[layout](torch.randn(shape).to(dtype))
        ours, _ = sketches(new, sums, start)
        oracle = reference.response_sketch_ref(new, sums, 7, start)
        positions = new[0, 0].numel()
        # Every value is added with a rounding of what is summed, and the magnitudes of a sample's add up to sqrt(P).
        size = largest(sums) + shape[0] * positions**0.5
        assert largest(ours - oracle) <= (positions + shape[0] + 4) * EPS * size, f"sums {shape}"
        ours, theirs = sketches(values(shape, dtype, layout), sums, start)
        assert torch.equal(ours.isfinite().all(1), theirs.isfinite().all(1)), "a channel that diverged"


@pytest.mark.parametrize("shape", [(5, 19), (3, 7, 11), (3, 16, 2), (0, 4), (4, 0), (2, 3, 0)], ids=str)
def test_response_sketch_of_features_and_tokens(shape: tuple[int, ...]) -> None:
    sums = torch.zeros(shape[1], 6, dtype=torch.float64)
    for new in (integers(*shape), integers(*shape).movedim(1, -1).contiguous().movedim(-1, 1)):
        assert_same_bits(*sketches(new, sums, 5))
