"""A trace of one step for Perfetto or chrome://tracing: ranges and operators as PyTorch's profiler writes them."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparse_bwd.measure.profile.ranges import Range, Ranges
from sparse_bwd.measure.training_step import TrainingStep

NAME = "trace.json"


class Marks:
    """A sink that makes ranges of PyTorch's profiler (`recorded`) and of NVTX (`nvtx`)."""

    def __init__(self, recorded: bool, nvtx: bool) -> None:
        self.recorded, self.nvtx = recorded, nvtx
        self._open: list[Any] = []

    def begin(self, what: Range) -> None:
        if self.recorded:
            self._open.append(torch.profiler.record_function(str(what)))
            self._open[-1].__enter__()
        if self.nvtx:
            torch.cuda.nvtx.range_push(str(what))

    def end(self) -> None:
        if self.nvtx:
            torch.cuda.nvtx.range_pop()
        if self.recorded:
            self._open.pop().__exit__(None, None, None)


def run_in_ranges(step: TrainingStep, ranges: Ranges) -> None:
    """One step, of which every part, layer and backward of a layer is a range."""
    with ranges.watched():
        for name, part in step.parts.items():
            with ranges.phase(name):
                part()


def trace(step: TrainingStep, cuda: bool) -> dict[str, Any]:
    """Chrome's trace of one step, as JSON."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notices go to stderr, for one that there is no GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    marks = Marks(recorded=True, nvtx=cuda)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        run_in_ranges(step, Ranges(step.variant.model, marks))
    return _as_json(profiler)


def _as_json(profiler: Any) -> dict[str, Any]:
    """What the profiler exports, without the names of this machine and of the file that it was exported to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        profiler.export_chrome_trace(str(path))
        content: dict[str, Any] = json.loads(path.read_text())
    return {key: value for key, value in content.items() if key not in ("traceName", "host_name")}
