"""Tensors, tolerances and tiles for the tests of Triton's kernels.

Small integers must come out exactly, in any order of summation. Random values are held to what the dtype allows:
products of float16 are exact in float32, so only the rounding of the result remains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend, tuning

# The interpreter computes bfloat16 wrongly, without a word; on a GPU it is tried as well.
DTYPES = [torch.float32, torch.float16] + ([] if backend.INTERPRETED else [torch.bfloat16])
# Relative error in the norm of what is rounded once at the end (float32: of sums in float32).
ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def integers(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", largest: int = 2
) -> Tensor:
    """Small integers; a new draw in every call."""
    return torch.randint(-largest, largest + 1, shape, device=device).to(dtype)


def values(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal values; a new draw in every call."""
    return torch.randn(shape, device=device).to(dtype)


def assert_near(actual: Tensor, oracle: Tensor, make: Callable[..., Tensor]) -> None:
    """`actual` is the float64 `oracle` in its dtype: exactly where `make` drew integers, else within its error."""
    assert actual.shape == oracle.shape
    if make is integers:
        assert torch.equal(actual, oracle.to(actual.dtype))
        return
    assert actual.isfinite().all()
    error = (actual.double() - oracle).norm() / oracle.norm().clamp(min=1e-30)
    assert error < ERROR[actual.dtype], float(error)


def config(monkeypatch: pytest.MonkeyPatch, kernel: str, tile: Mapping[str, int]) -> None:
    """Let a kernel have this one configuration, which serves every call."""
    table: dict[str, Any] = {"configs": {kernel: [{"tile": dict(tile), "warps": 4, "stages": 2}]}}
    before = tuning.tables()
    monkeypatch.setattr(tuning, "tables", lambda: [{tuning.DEFAULT: table}, *before])
