"""How a row of the suites is timed, and why its ratio is not one of two benchmarks' times.

pytest-benchmark runs one benchmark after the other. Minutes lie between a group's `dense` and its last row, and on a
shared machine they see different clocks: the quotient of their times changes by tens of percent without a change of the
code. So each row runs beside dense in interleaved rounds of the library's own meter, and the quotient is taken within
each round: what slows a round down slows both down. `extra_info["ratio"]` has p20, p50 and p80 of these quotients,
which is what `benchmarks.regression` reads. Dense runs in both layouts, and the faster one is the denominator, so that
no layout has to be guessed. pytest-benchmark's own times follow, for its tables and for `--benchmark-compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparse_bwd.measure.meter import Meter, meter_for, quantiles

Run = Callable[[], object]
TINY_ROUNDS = 2


@dataclass(frozen=True)
class Timer:
    """Fills in a benchmark. `cold`: of a GPU, time the work of the device alone."""

    benchmark: BenchmarkFixture
    device: str
    tiny: bool

    def time(
        self,
        group: str,
        dense: Mapping[str, Run],
        run: Run | None,
        about: Mapping[str, Any],
        rounds: int,
        cold: bool,
    ) -> None:
        """Time `run` beside dense, given by layout; None = dense itself, in its faster layout."""
        rounds = TINY_ROUNDS if self.tiny else rounds
        self.benchmark.group = group
        self.benchmark.extra_info.update(about, device=self.device, threads=torch.get_num_threads())
        samples = _samples(meter_for(self.device, rounds), {**dense, **({"": run} if run else {})}, cold)
        layout = min(dense, key=lambda name: quantiles(samples[name])[1])
        self.benchmark.extra_info["dense_layout"] = layout
        if run is not None:
            pairs = zip(samples[""], samples[layout], strict=True)
            self.benchmark.extra_info["ratio"] = quantiles([ours / theirs for ours, theirs in pairs])
        self.benchmark.pedantic(self._finished(run or dense[layout]), rounds=rounds, warmup_rounds=1)

    def _finished(self, run: Run) -> Run:
        """Up to the end of the work on the device."""
        if self.device == "cpu":
            return run

        def finished() -> None:
            run()
            torch.cuda.synchronize()

        return finished


def _samples(meter: Meter, runs: Mapping[str, Run], cold: bool) -> dict[str, list[float]]:
    taken = meter.samples({name: {"": run} for name, run in runs.items()}, cold)
    return {name: parts[""] for name, parts in taken.items()}
