"""Fixtures of the whole suite: threads, seeds and poisoned memory.

Uninitialised memory is poisoned: whatever `sparse_bwd` asks of `torch.empty` and its relatives comes back full of
NaN (integers: their largest value), so that an element which nobody writes cannot pass a test by luck.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

PACKAGE = str(Path(__file__).resolve().parent.parent / "sparse_bwd")
THREADS = 1  # the tensors of the tests are tiny, and pytest-xdist fills the other cores
torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state and thread count, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor of any dtype with the value that is least likely to go unnoticed."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap one allocating function: calls from the package get poisoned memory, all others are untouched."""

    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # a traced call cannot look at its frames
            return tensor
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            with torch.no_grad():
                poison(tensor)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Poison what the package allocates without writing it (STYLE: fla's `poison_torch_memory`)."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
    yield
