"""Triton's kernels without a GPU: in the interpreter, each file in a process of its own, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_bwd.ops import backend, tuning

HERE = Path(__file__).parent / "triton"
FILES = sorted(path.name for path in HERE.glob("test_*.py"))


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Why Triton's kernels cannot run, asked anew; on a machine with a GPU of sm_75."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    yield backend._no_triton.__wrapped__
    backend.architecture.cache_clear()


def test_the_reason_why_it_cannot_run(no_triton: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_triton() == "the GPU is of sm_75, and its kernels need sm_80 or later"
    assert backend.architecture(torch.device("cuda")) == "sm_75"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert no_triton() == ""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in no_triton()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert no_triton() == "this machine has no CUDA device"
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert no_triton() == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert no_triton() == "triton is not installed"
    monkeypatch.setenv("SPARSE_BWD_TRITON", "0")
    assert no_triton() == "SPARSE_BWD_TRITON=0 turns Triton's kernels off"


def test_the_table_says_who_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def served(name: str, answer: Any) -> Callable[..., Any]:
        return lambda *_: calls.append(name) or answer

    known = {
        "plain": served("plain", 1),
        "native": served("native", 2),
        "triton": served("triton", NotImplemented),
    }
    monkeypatch.setattr(tuning, "order", lambda *_: ("triton", "native", "plain"))
    assert backend._choosing("linear_dw", "cuda", known)(torch.ones(1)) == 2
    assert calls == ["triton", "native"]
    with backend.forced("plain"):
        assert backend._choosing("linear_dw", "cuda", known)([torch.ones(1)]) == 1
    assert backend._order("linear_dw", "cuda", ([torch.ones(1)],)) == ("triton", "native", "plain")
    assert backend._order("linear_dw", "cpu", ()) == backend._order("norm_affine", "cuda", ()) == ("native",)


def test_force_needs_a_machine_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_no_triton", lambda: "of a reason")
    with (
        pytest.raises(ValueError, match="Triton's kernels cannot run: of a reason"),
        backend.forced("triton"),
    ):
        pass
    assert backend._late("linear_dw", "linear_dw")() is NotImplemented
    monkeypatch.setattr(backend, "_no_triton", lambda: "")
    rows = {(row.operator, row.device): row for row in backend.status()}
    assert rows["linear_dw", "cuda"].implementation == "triton"


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    """The interpreter is chosen when Triton is imported, so the tests run in another process."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", str(HERE / name)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        cwd=HERE.parent.parent,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-1000:]
