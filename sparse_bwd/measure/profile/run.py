"""A profile: one training step, looked at from every side, each time in a run of its own.

memory    a step as it is, its allocations written down (no ranges)
plain     steps timed as a whole (no ranges)
ranges    steps of which every range is timed, ranges alternating with plain steps
trace     a step under PyTorch's profiler, which slows short operations most: its lengths are not the table's
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparse_bwd.files import write_atomically, write_json
from sparse_bwd.measure.kernels import precision
from sparse_bwd.measure.machine import machine
from sparse_bwd.measure.profile.asked import Asked, prepare
from sparse_bwd.measure.profile.clock import Clock, cuda_clock, host_clock, medians
from sparse_bwd.measure.profile.least import calls_of
from sparse_bwd.measure.profile.memory import write_snapshot, write_timeline
from sparse_bwd.measure.profile.ncu import WARM
from sparse_bwd.measure.profile.ranges import Range, Ranges
from sparse_bwd.measure.profile.roofline import Ceilings, ceilings
from sparse_bwd.measure.profile.table import (
    CAPTION,
    MIB,
    WORDS,
    Row,
    as_markdown,
    as_text,
    make_rows,
    total_of,
)
from sparse_bwd.measure.profile.trace import NAME as TRACE
from sparse_bwd.measure.profile.trace import Marks, run_in_ranges, trace
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.training.errors import UserError
from sparse_bwd.version import __version__

VERSION = 1
ROUNDS = 7
PROFILE, LAYERS = "profile.json", "layers.md"
HINTS = {
    TRACE: "open in ui.perfetto.dev or chrome://tracing",
    "memory.pickle": "open in PyTorch's memory viewer, docs.pytorch.org/memory_viz",
}


@dataclass(frozen=True)
class Profile:
    """What was found. Times in ms, medians over the rounds; `step_ms`: of whole steps without ranges."""

    asked: Asked
    command: str
    machine: dict[str, Any]
    ceilings: Ceilings
    step_ms: float
    peak: int
    rows: tuple[Row, ...]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; sizes in bytes."""
        total = total_of(self.rows)
        return {
            "version": VERSION,
            "kind": "profile",
            "command": self.command,
            "machine": self.machine,
            "asked": self.asked.to_dict(),
            "ceilings": {"GB/s": self.ceilings.bandwidth, "GFLOP/s": self.ceilings.product},
            "step_ms": self.step_ms,
            "ranges_ms": {"forward": total.forward, "backward": total.backward, "optimizer": total.update},
            "peak": self.peak,
            "rows": [row.to_dict() for row in self.rows],
            "files": list(self.files),
        }

    def head(self) -> str:
        """What was measured, and the whole step."""
        asked, total = self.asked, total_of(self.rows)
        words = ", ".join(f"{key} {value}" for key, value in asked.to_dict().items() if value is not None)
        return (
            f"{words}\nStep {self.step_ms:.2f} ms; its ranges, each by its median, {total.ms:.2f} ms: forward "
            f"{total.forward:.2f}, backward {total.backward:.2f}, optimizer {total.update:.2f}. Peak "
            f"{self.peak / MIB:,.2f} MiB.\nCeilings of the roofline, measured now: B = {self.ceilings.bandwidth:.1f} "
            f"GB/s, P = {self.ceilings.product:.1f} GFLOP/s."
        )

    def as_text(self, top: int) -> str:
        """For a terminal."""
        files = [f"{name}: {HINTS[name]}" if name in HINTS else name for name in self.files]
        return "\n".join([
            self.head(), "", as_text(self.rows, top), CAPTION, WORDS, "", "; ".join(files)
        ])  # fmt: skip

    def as_markdown(self, top: int) -> str:
        """The page `layers.md`."""
        lines = [
            f"# Layers of one step\n\n    {self.command}\n",
            self.head(),
            "",
            as_markdown(self.rows, top),
        ]
        return "\n".join([*lines, "", CAPTION, "", WORDS, ""])


def run(asked: Asked, out: Path, top: int) -> Profile:
    """Everything, with the files in `out`, which appear last."""
    asked.check_device()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder.")
    step = prepare(asked, asked.device)
    command = shlex.join(["sparse-bwd", "profile", *asked.words(), "--out", out.name or "."])
    with _placed(asked):
        for _ in range(WARM):
            step.step()
        out.mkdir(parents=True, exist_ok=True)
        title = f"{asked.question.model}: allocated bytes over one training step"
        files, peak = write_snapshot(step, out) if asked.on_gpu else write_timeline(step, out, title)
        whole, times = timed(step, asked.on_gpu)
        content = trace(step, asked.on_gpu)
        limits = ceilings(asked.device, asked.dtype)
    rows = tuple(make_rows(times, calls_of(step), limits))
    where = {**machine(asked.device), "sparse_bwd": __version__}
    found = Profile(asked, command, where, limits, whole, peak, rows, (TRACE, *files, PROFILE, LAYERS))
    write_atomically(out / TRACE, lambda file: _write(file, json.dumps(content)))
    write_json(out / PROFILE, found.to_dict())
    write_atomically(out / LAYERS, lambda file: _write(file, found.as_markdown(top)))
    return found


def _write(file: Any, text: str) -> None:
    file.write(text.encode())


def timed(step: TrainingStep, on_gpu: bool) -> tuple[float, dict[Range, float]]:
    """ms of a whole step without ranges, and of every range; rounds of one step of each."""
    clock: Clock = cuda_clock() if on_gpu else host_clock()
    wait: Callable[[], object] = torch.cuda.synchronize if on_gpu else lambda: None
    ranges, wholes, rounds = Ranges(step.variant.model, clock), [], []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter()
        step.step()
        wait()
        wholes.append((time.perf_counter() - start) * 1e3)
        run_in_ranges(step, ranges)
        wait()
        rounds.append(clock.times())
    return median(wholes), medians(rounds)


def run_step(asked: Asked) -> None:
    """The warm-up and one step in NVTX ranges, and nothing else: what Nsight Compute starts."""
    asked.check_device()
    step = prepare(asked, asked.device)
    with _placed(asked):
        for _ in range(WARM):
            step.step()
        with torch.autograd.profiler.emit_nvtx() if asked.on_gpu else nullcontext():
            run_in_ranges(step, Ranges(step.variant.model, Marks(recorded=False, nvtx=asked.on_gpu)))
        if asked.on_gpu:
            torch.cuda.synchronize()


def _placed(asked: Asked) -> AbstractContextManager[object]:
    """Inside, the GPU that is asked for is the current one, and products have the precision that is asked for."""
    stack = ExitStack()
    stack.enter_context(precision(asked.dtype))
    if asked.on_gpu:
        stack.enter_context(torch.cuda.device(asked.device))
    return stack
