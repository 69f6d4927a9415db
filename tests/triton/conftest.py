"""Where the tests of Triton's kernels run: on a GPU, or on the CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparse_bwd.ops import backend


@pytest.fixture(scope="session")
def device() -> str:
    """The device of the tensors; skips where Triton can run nothing."""
    if torch.cuda.is_available():
        return "cuda"
    if not backend.INTERPRETED:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 (tests/test_triton.py runs these files with it)")
    return "cpu"


@pytest.fixture(autouse=True)
def served_by_triton(device: str) -> Iterator[None]:
    """Every operator must be served by its Triton kernels."""
    with backend.forced("triton"):
        yield
