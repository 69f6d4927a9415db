"""Where memory goes in one step: on a CPU a timeline of allocated bytes by kind, on CUDA a snapshot for a viewer."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from sparse_bwd.files import write_atomically, write_json
from sparse_bwd.measure.profile.ranges import Ranges
from sparse_bwd.measure.profile.trace import Marks, run_in_ranges
from sparse_bwd.measure.timeline_figure import draw_step
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.memory.timeline import timeline

VERSION = 1
SNAPSHOT, TIMELINE, FIGURE = "memory.pickle", "timeline.json", "timeline.png"
ENTRIES = 200_000  # allocator events that a snapshot holds at most


def write_timeline(step: TrainingStep, out: Path, title: str) -> tuple[list[str], int]:
    """The files of a step on a CPU, and its peak in bytes. The step runs as it does without a profile."""
    found = timeline(step.parts, step.variant.model, step.optimizer)
    content: dict[str, Any] = {"version": VERSION, "kind": "timeline", "title": title, **found.to_dict()}
    write_json(out / TIMELINE, content)
    try:
        draw_step(content, title, out / FIGURE)
    except ImportError:  # matplotlib is no part of the extra that the command line needs
        return [TIMELINE], found.peak
    return [FIGURE, TIMELINE], found.peak


def write_snapshot(step: TrainingStep, out: Path) -> tuple[list[str], int]:
    """The file of a step on CUDA, in which every allocation has its stack, and its peak in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=ENTRIES)
    try:
        run_in_ranges(step, Ranges(step.variant.model, Marks(recorded=False, nvtx=True)))
        torch.cuda.synchronize()
        content = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    write_atomically(out / SNAPSHOT, lambda file: pickle.dump(content, file))
    return [SNAPSHOT], torch.cuda.max_memory_allocated() - before
