"""How times are taken: calls in interleaved rounds after a warm-up, each round running every call once.

What counts are quantiles, and ratios between calls of the same rounds: a change of the machine's speed hits them all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

WARM = 2
QUANTILES = (0.2, 0.5, 0.8)
HEAD_START = 300_000  # cycles by which the GPU starts late, for each call that is queued meanwhile
Name = TypeVar("Name")
Parts = Mapping[str, Callable[[], object]]  # of a call, in order


def quantiles(values: list[float]) -> list[float]:
    """p20, p50 and p80 with four digits."""
    if not values:
        return [math.nan] * len(QUANTILES)
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return [float(f"{value:.4g}") for value in found.tolist()]


@dataclass
class Meter:
    """Times by the host's clock. `rounds` 0: every call runs in the warm-up alone."""

    rounds: int
    device: str = "cpu"

    def times(self, calls: Mapping[Name, Callable[[], object]], cold: bool = True) -> dict[Name, list[float]]:
        """p20, p50 and p80 of each call, in ms.

        Args:
            cold: time the work on the device alone, every call with its inputs out of the cache; else from the start
                of a call on the host to the end of its work.
        """
        taken = self.samples({name: {"": call} for name, call in calls.items()}, cold)
        return {name: quantiles(parts[""]) for name, parts in taken.items()}

    def samples(
        self, calls: Mapping[Name, Parts], cold: bool = True, each: Callable[[], object] | None = None
    ) -> dict[Name, dict[str, list[float]]]:
        """ms of every part of each call, one per round; `each` is called after every round."""
        for _ in range(WARM if self.rounds else 1):
            for parts in calls.values():
                for call in parts.values():
                    call()
        taken: dict[Name, dict[str, list[float]]] = {
            name: {part: [] for part in parts} for name, parts in calls.items()
        }
        for _ in range(self.rounds):
            for name, found in self.round(calls, cold).items():
                for part, ms in found.items():
                    taken[name][part].append(ms)
            if each is not None:
                each()
        return taken

    def round(self, calls: Mapping[Name, Parts], cold: bool) -> dict[Name, dict[str, float]]:
        """ms of every part of each call, each once."""
        found: dict[Name, dict[str, float]] = {}
        for name, parts in calls.items():
            found[name] = {}
            for part, call in parts.items():
                start = time.perf_counter()
                call()
                found[name][part] = (time.perf_counter() - start) * 1e3
        return found

    def memory(self) -> tuple[int, int] | None:
        """Bytes that the allocator has given out, and those it has taken from the driver; None where it counts none."""
        return None

    def release(self) -> None:
        """Give memory that is not used back."""


class CudaMeter(Meter):
    """Times by CUDA events.

    Before every call a buffer of four times the size of the L2 is read. Where the device's work alone counts, a kernel
    that only waits gives the host the time to queue a round, so that the device never waits for it.
    """

    def __init__(self, rounds: int) -> None:
        super().__init__(rounds, "cuda")
        self.flush = torch.ones(torch.cuda.get_device_properties(0).L2_cache_size, device="cuda")
        self.sink = torch.empty((), device="cuda")

    def round(self, calls: Mapping[Name, Parts], cold: bool) -> dict[Name, dict[str, float]]:
        events: dict[Name, list[Any]] = {}
        torch.cuda.synchronize()
        if cold:
            torch.cuda._sleep(HEAD_START * len(calls))
        for name, parts in calls.items():
            marks = events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
            torch.sum(self.flush, 0, out=self.sink)
            if not cold:
                torch.cuda.synchronize()  # what the host takes to start the work is part of it
            marks[0].record()
            for mark, call in zip(marks[1:], parts.values(), strict=True):
                call()
                mark.record()
        torch.cuda.synchronize()
        return {
            name: {
                part: start.elapsed_time(end)
                for part, start, end in zip(calls[name], marks, marks[1:], strict=False)
            }
            for name, marks in events.items()
        }

    def memory(self) -> tuple[int, int]:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def release(self) -> None:
        torch.cuda.empty_cache()


def meter_for(device: str, rounds: int) -> Meter:
    """The meter of a kind of device."""
    return CudaMeter(rounds) if torch.device(device).type == "cuda" else Meter(rounds)
