"""Allocator events of one run, read from PyTorch's profiler.

On CPU nothing else tells how much memory is allocated: there are no allocator statistics, and the size of the process
is noisy. The events come from private names of the profiler; when they are gone, `EventsUnavailable` says so.
A block that was allocated before the recording and is freed within it leaves no event: it counts as still alive.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MARK = "sparse_bwd.mark:"
PART = "part "  # begins the kind of a mark that says which part of the run begins


class EventsUnavailable(RuntimeError):
    """This PyTorch does not report its allocations to the profiler."""


@dataclass(frozen=True)
class Event:
    """An allocation (`nbytes` > 0), a release (< 0), or a mark set by `mark` (`kind` names it, 0 bytes);
    of a part that begins, `kind` is PART and its name.

    `time` is in ns; `address` is the block's, equal to the data pointer of the storage that lives in it.
    """

    time: int
    address: int
    nbytes: int
    kind: str = ""


def mark(kind: str, tensor: torch.Tensor) -> None:
    """Leave a remark in the running recording: the storage of `tensor` is a `kind`."""
    with torch.profiler.record_function(f"{MARK}{kind}:{tensor.untyped_storage().data_ptr()}"):
        pass


def mark_part(name: str) -> None:
    """Leave a remark in the running recording: a part of the run begins."""
    with torch.profiler.record_function(f"{MARK}{PART}{name}:-1"):
        pass


def record(fn: Callable[[], object], device: str) -> list[Event]:
    """Run `fn` and return the allocator events of one device type ("cpu" or "cuda"), in time order."""
    # Kineto's own notices go straight to stderr, for example that a machine has no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        fn()
    results = getattr(getattr(profiler, "profiler", None), "kineto_results", None)
    tree = getattr(results, "experimental_event_tree", None)
    if tree is None:
        raise EventsUnavailable(
            f"PyTorch {torch.__version__} no longer offers the profiler's allocator events, which CPU peaks are read "
            "from. Measure on a CUDA device, or install a PyTorch between 2.11 and 2.14."
        )
    found: list[Event] = []
    pending = list(tree())
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        event = _event(node, device)
        if event is not None:
            found.append(event)
    return sorted(found, key=lambda event: event.time)


def _event(node: Any, device: str) -> Event | None:
    """The event of one node of the profiler's tree; None for operators and other devices."""
    size = getattr(node.extra_fields, "alloc_size", None)
    if size is not None:
        if node.extra_fields.device.type != device:
            return None
        return Event(node.start_time_ns, int(node.extra_fields.ptr), int(size))
    if node.name.startswith(MARK):
        kind, address = node.name[len(MARK) :].rsplit(":", 1)
        return Event(node.start_time_ns, int(address), 0, kind)
    return None
