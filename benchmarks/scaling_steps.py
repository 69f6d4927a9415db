"""The part of `benchmarks.scaling` that measures training steps against one size of the network or of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import sparse_bwd as sb
from benchmarks.scaling_fit import line, power
from benchmarks.scaling_networks import CLASSES, builder
from sparse_bwd.measure.meter import Meter
from sparse_bwd.measure.step import Setting, dense, ours
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.memory import peak_bytes, predict, saved_bytes
from sparse_bwd.selection.limits import example_loss

Json = dict[str, Any]
QUANTITIES = ("time", "saved", "peak", "predicted")
GIB = 2**30


@dataclass(frozen=True)
class Point:
    """One step: `blocks` + 1 convolutions of `width` channels, `selected` of which train, on `batch` images."""

    batch: int = 8
    size: int = 32
    width: int = 32
    blocks: int = 6
    selected: int = 4
    axis: str = "out"

    @property
    def setting(self) -> Setting:
        return Setting(builder(self.width, self.blocks), self.batch, self.size, CLASSES)

    def step(self, variant: str) -> TrainingStep:
        """A training step of "dense" or of "ours"."""
        if variant == "dense":
            made = dense(self.setting, "channels_last")
        else:
            made = ours(self.setting, "channels_last", self.selected / self.width, self.axis)
        return TrainingStep(made, made.model)


@dataclass(frozen=True)
class Sweep:
    """Points along one size, and the exponents that the formulas give for time, saved bytes and peak.

    floor: also measure a step that trains one channel of the first convolution, what is left as k goes to 0.
    """

    label: str
    values: tuple[int, ...]
    point: Callable[[int], Point]
    expected: dict[str, float]
    quick: tuple[int, ...]
    floor: bool = False


def _expected(time: float, saved: float, peak: float) -> dict[str, float]:
    return {"time": time, "saved": saved, "peak": peak, "predicted": peak}


SWEEPS = {
    "batch": Sweep("images in a batch", (1, 2, 4, 8, 16, 32, 64), lambda n: Point(batch=n),
                   _expected(1, 1, 1), (1, 2, 4)),
    "size": Sweep("side of an image (pixels)", (8, 16, 32, 64, 128), lambda n: Point(batch=2, size=n),
                  _expected(2, 2, 2), (4, 8, 16)),
    "depth": Sweep("convolutions", (3, 5, 9, 17, 33, 65), lambda n: Point(batch=4, size=16, blocks=n - 1),
                   _expected(1, 1, 1), (2, 3, 5)),
    "width": Sweep("channels C of a layer", (16, 32, 64, 128, 256),
                   lambda n: Point(batch=4, size=16, width=n, blocks=4, selected=n // 8),
                   _expected(2, 1, 2), (8, 16, 32)),
    "selected": Sweep("trained channels k, of 128", (1, 2, 4, 8, 16, 32, 64, 128),
                      lambda n: Point(batch=4, size=16, width=128, blocks=4, selected=n, axis="in"),
                      _expected(1, 1, 1), (1, 2, 4), floor=True),
}  # fmt: skip


def run(sweep: Sweep, rounds: int, quick: bool) -> Json:
    """Measure a sweep: bytes point by point, then times in interleaved rounds, and fit them."""
    values = sweep.quick if quick else sweep.values
    steps = {(variant, n): sweep.point(n).step(variant) for n in values for variant in ("dense", "ours")}
    rows: dict[str, list[Json]] = {"dense": [], "ours": []}
    for (variant, _), step in steps.items():
        rows[variant].append(_bytes(step))
    calls: dict[Any, Callable[[], object]] = {key: step.step for key, step in steps.items()}
    if sweep.floor:
        calls["floor"] = _floor(sweep.point(1)).step
    times = Meter(rounds).times(calls, cold=False)
    for place, n in enumerate(values):
        for variant in rows:
            rows[variant][place]["time"] = times[variant, n]
    found: Json = {"label": sweep.label, "x": list(values), "expected": sweep.expected, **rows}
    found["fits"] = {variant: fits(values, rows[variant], sweep.expected) for variant in rows}
    if sweep.floor:
        found["limits"] = _selected_limits(sweep, values, rows["ours"], times["floor"][1])
    if "images" in sweep.label and not quick:
        found["limits"] = {name: largest_batch(sweep, name, values, rows[name]) for name in rows}
    return found


def _bytes(step: TrainingStep) -> Json:
    for _ in range(2):
        step.step()
    model, x = step.variant.model, step.variant.x
    return {
        "saved": saved_bytes(step.loss, model),
        "peak": peak_bytes(step.step, "cpu").peak,
        "predicted": predict(model, None, x, loss=example_loss).peak,
    }


def _floor(point: Point) -> TrainingStep:
    """A step in which every layer passes dx on and none but the first trains a channel."""
    step = point.step("ours")
    sb.apply(step.variant.model, {"0": [0]})
    step.renew_optimizer()
    return step


def fits(x: Sequence[float], rows: Sequence[Json], expected: dict[str, float]) -> Json:
    """Exponent, its error, how many points it is of, and whether it is at most the expected one."""
    found = {}
    for quantity in QUANTITIES:
        fit = power(x, values_of(rows, quantity))
        found[quantity] = {**fit.__dict__, "ok": fit.within(expected[quantity] + 0.1)}
    return found


def values_of(rows: Sequence[Json], quantity: str) -> list[float]:
    """One number per row: the median of times, bytes as they are."""
    return [row[quantity][1] if quantity == "time" else row[quantity] for row in rows]


def _selected_limits(sweep: Sweep, values: Sequence[int], rows: Sequence[Json], floor: float) -> Json:
    """What straight lines through the points say about k = 0 and k = C, beside what is measured and predicted."""
    width = sweep.point(1).width
    start, slope = line(values, values_of(rows, "time"))
    half = [i for i, n in enumerate(values) if n <= width // 2]
    few = [values[i] for i in half]
    base, rise = line(few, [rows[i]["peak"] for i in half])
    return {
        "time_at_0": start,
        "floor": floor,
        "time_at_all": start + slope * width,
        "measured_at_all": values_of(rows, "time")[-1],
        "peak_at_all": base + rise * width,
        "measured_peak_at_all": rows[-1]["peak"],
        "predicted_peak_at_all": rows[-1]["predicted"],
    }


def largest_batch(sweep: Sweep, variant: str, values: Sequence[int], rows: Sequence[Json]) -> Json:
    """Images whose step peaks at 1 GiB: by the line through the measured peaks, and by `predict`, to 1 %."""
    start, slope = line(values, values_of(rows, "peak"))
    fitted = int((GIB - start) / slope)
    point = sweep.point(1)
    step = point.step(variant)

    def fits_in(batch: int) -> bool:
        example = torch.empty(batch, 3, point.size, point.size, device="meta")
        example = example.to(memory_format=torch.channels_last)
        return predict(step.variant.model, None, example, loss=example_loss).peak <= GIB

    low, high = int(0.88 * fitted), int(1.12 * fitted)
    while high - low > max(fitted // 100, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits_in(middle) else (low, middle)
    return {"fitted": fitted, "predicted": low}
