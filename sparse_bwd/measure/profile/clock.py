"""Times of ranges, each without the ranges inside it, so that all of them add up to the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from sparse_bwd.measure.profile.ranges import Range


@dataclass
class _Open:
    what: Range
    start: Any
    inside: list[tuple[Any, Any]] = field(default_factory=list)


class Clock:
    """A sink that takes times.

    Args:
        now: a moment; of a GPU an event, whose time is known later.
        between: ms from one moment to another.
    """

    def __init__(self, now: Callable[[], Any], between: Callable[[Any, Any], float]) -> None:
        self._now, self._between = now, between
        self._open: list[_Open] = []
        self._closed: list[tuple[_Open, Any]] = []

    def begin(self, what: Range) -> None:
        self._open.append(_Open(what, self._now()))

    def end(self) -> None:
        end, range_ = self._now(), self._open.pop()
        self._closed.append((range_, end))
        if self._open:
            self._open[-1].inside.append((range_.start, end))

    def times(self) -> dict[Range, float]:
        """ms of every range since the last call, ranges inside it taken off; of a GPU once it is done."""
        found: dict[Range, float] = {}
        for range_, end in self._closed:
            inside = sum(self._between(*moments) for moments in range_.inside)
            taken = self._between(range_.start, end) - inside
            found[range_.what] = found.get(range_.what, 0.0) + taken
        self._closed = []
        return found


def host_clock() -> Clock:
    """By the clock of the host."""
    return Clock(time.perf_counter, lambda start, end: (end - start) * 1e3)


def cuda_clock() -> Clock:
    """By events in the GPU's queue: a range begins when the GPU gets there, and waiting for the host counts."""

    def now() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return Clock(now, lambda start, end: float(start.elapsed_time(end)))


def medians(rounds: Sequence[Mapping[Range, float]]) -> dict[Range, float]:
    """The median of every range over rounds."""
    return {what: median(each.get(what, 0.0) for each in rounds) for what in rounds[0]}
