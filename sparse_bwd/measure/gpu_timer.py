"""Times of operator calls on a GPU: by events, with the cache flushed, and only of kernels that are right."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.measure.kernels import Call, precision
from sparse_bwd.ops import backend
from sparse_bwd.ops.tuning import Config

REPEATS = 15
INPUTS = 2  # sets of arguments that take turns
AHEAD = 500_000  # cycles by which the GPU starts late, for each repetition that is queued meanwhile
ERROR = 2e-2  # relative error in the norm; a kernel that computes something else is further away


class GpuTimer:
    """Median time of calls on the current GPU, in ms; a `Timer` of `tune.py`."""

    def __init__(self, device: str = "cuda", flush_bytes: int = 1 << 28) -> None:
        self.device = device
        self.flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
        self._call: Call | None = None
        self._inputs: list[tuple[Any, ...]] = []
        self._right: list[Tensor] = []

    def __call__(self, call: Call, implementation: str, config: Config | None = None) -> float | None:
        if implementation == "native" and not _has_native(call.operator):
            return None
        with precision(call.dtype):
            if call is not self._call:
                self._prepare(call)
            if implementation == "plain":
                with backend.forced("plain"):
                    return self._median(call)
            try:
                with backend.forced(implementation):
                    return self._median(call) if self._is_right(call) else None
            except Exception:  # does not serve the call, does not compile, does not fit: no time
                return None

    def _prepare(self, call: Call) -> None:
        """New arguments, and what plain PyTorch makes of them."""
        self._inputs, self._right = [], []  # free before the next are made
        self._inputs = [call.arguments(self.device) for _ in range(INPUTS)]
        with backend.forced("plain"):
            self._right = self._outcome(call)
        self._call = call

    def _outcome(self, call: Call) -> list[Tensor]:
        """Results of a call on arguments that are the same every time, and the arguments that it may have changed."""
        torch.manual_seed(0)
        arguments = call.arguments(self.device)
        result = _operator(call)(*arguments)
        return [each for each in _tensors((result, arguments)) if each.is_floating_point()]

    def _is_right(self, call: Call) -> bool:
        found = self._outcome(call)
        pairs = zip(found, self._right, strict=True)
        norms = [((a - b).norm(), b.norm()) for a, b in ((a.double(), b.double()) for a, b in pairs)]
        return all(float(error) <= ERROR * float(norm) for error, norm in norms)

    def _median(self, call: Call) -> float:
        run = _operator(call)
        run(*self._inputs[0])  # compiles
        events = []
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD * REPEATS)
        for number in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run(*self._inputs[number % INPUTS])
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        taken: list[float] = [start.elapsed_time(end) for start, end in events]
        return statistics.median(taken)


def _operator(call: Call) -> Any:
    return getattr(torch.ops.sparse_bwd, call.operator).default


def _has_native(operator: str) -> bool:
    return backend.has_native(operator, "cuda")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
