"""Starting kernels: on a GPU, in Triton's interpreter, or only writing down what would be started.

A launch that is written down needs tensors for their types alone, so that every kernel can be compiled ahead of time,
for any architecture, with exactly the arguments of a real call (`recorded`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.ops import backend, tuning
from sparse_bwd.ops.tuning import Config

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and everything that it is given; `table` names the table that its configuration is from."""

    kernel: Any
    table: str | None
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # tensors, None for an absent one, and numbers
    constants: Mapping[str, Any]  # known when the kernel is compiled, the tile included
    warps: int
    stages: int


class _Recorder:
    """What is written down, and from which configurations."""

    def __init__(self, architecture: str, chosen: Config | None, must: bool) -> None:
        self.architecture, self.chosen, self.must = architecture, chosen, must
        self.table: str | None = None
        self.launches: list[Launch] = []


_recorder: _Recorder | None = None


@contextmanager
def recorded(architecture: str, chosen: Config | None = None, must: bool = True) -> Iterator[list[Launch]]:
    """Inside, launches are written down as they would be on an architecture ("sm_90"), and nothing runs.

    `chosen`: the configuration to take in place of what the table says; `must`: also where the table would leave the
    call to others.
    """
    global _recorder
    before, _recorder = _recorder, _Recorder(architecture, chosen, must)
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def config(table: str, x: Tensor, **sizes: float) -> Config | None:
    """`tuning.config` for the GPU of x; where Triton is forced, it never leaves the call to others."""
    if _recorder is None:
        return tuning.config(table, backend.architecture(x.device), backend.is_forced("triton"), **sizes)
    _recorder.table = table
    return _recorder.chosen or tuning.config(table, _recorder.architecture, _recorder.must, **sizes)


def launch(
    kernel: Any, grid: tuple[int, ...], config: Config, constants: Mapping[str, Any], **arguments: Any
) -> None:
    """Start a kernel over a grid of programs."""
    if _recorder is not None:
        table, _recorder.table = _recorder.table, None
        known = {**constants, **config.tile}
        _recorder.launches.append(Launch(kernel, table, grid, arguments, known, config.warps, config.stages))
        return
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "cpu":  # the interpreter
        kernel[grid](**arguments, **constants, **config.tile)
        return
    with torch.cuda.device(device):  # pragma: no cover -- needs CUDA
        kernel[grid](**arguments, **constants, **config.tile, **options)


def precision(x: Tensor, convolution: bool) -> str:
    """How float32 matrices are multiplied: exactly, unless the user allows TF32 for such operators."""
    if x.dtype is not torch.float32:
        return "ieee"
    backends: Any = torch.backends
    allowed = backends.cudnn.conv if convolution else backends.cuda.matmul
    return "tf32" if allowed.fp32_precision == "tf32" else "ieee"


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
