"""The goals of `benchmarks.gpu`, judged from the rows of its JSON.

Ratios are of medians, each side in the faster of NCHW and channels_last; means are geometric, over distinct layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu_operators import family, layers_of, moving_calls
from sparse_bwd.measure.networks import NETWORKS

Row = Mapping[str, Any]
NOISE = 1.03  # two measurements of the same code differ by as much
PRECISIONS = ("fp32", "tf32", "bf16")
NAMES = {"fp32": "fp32", "tf32": "TF32", "bf16": "bf16"}
FAMILIES = ("depthwise", "1x1", "linear", "k x k")
NOT_MEASURED = "not measured"


class Verdict(NamedTuple):
    """What was measured, whether that is the goal, and whether it is all that the goal speaks of."""

    text: str
    met: bool
    complete: bool = True

    def __str__(self) -> str:
        word = "missed" if not self.met else "met" if self.complete else "met so far"
        return f"{self.text}: **{word}**"


Judge = Callable[[Row, str], Verdict | None]  # None: nothing of it was measured


class Goal(NamedTuple):
    """What is wanted, and how a precision is judged."""

    what: str
    goal: str
    judge: Judge


def rows(record: Row, kind: str, **wanted: Any) -> list[Row]:
    """Rows of a kind whose entries are as wanted."""
    found = [row for row in record["rows"] if row["kind"] == kind]
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def p50(spread: list[float]) -> float:
    return spread[1]


def geometric(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def copy_rate(record: Row) -> float | None:
    """Bytes per ms of the large copy."""
    found = rows(record, "ceilings")
    return found[0]["copy"][0] / p50(found[0]["copy"][1]) if found else None


def product_rate(record: Row, dtype: str) -> float | None:
    """Operations per ms of the large matrix product."""
    found = rows(record, "ceilings")
    if not found:
        return None
    operations, spread = found[0]["product"][dtype]
    return float(operations / p50(spread))


def fastest(row: Row, name: str, share: str) -> float | None:
    """ms of an implementation in the faster of the two layouts."""
    found = [p50(kinds[name][share]) for kinds in row["ms"].values() if share in kinds.get(name, {})]
    return min(found, default=None)


def shares_of(row: Row, most: float = 1.0) -> list[str]:
    return [share for share in row["work"] if float(share) <= most]


def speedups(found: Iterable[Row], over: str, share: str | None, most: float = 1.0) -> list[float]:
    """Time of "dense" or "gather" over that of ours, for one share or for all up to `most`."""
    values = []
    for row in found:
        for each in [share] if share is not None else shares_of(row, most):
            ours, other = fastest(row, "ours", each), fastest(row, over, "1" if over == "dense" else each)
            if ours is not None and other is not None:
                values.append(other / ours)
    return values


def layers_in(*families: str, network: str | None = None) -> int:
    """How many distinct layers of these families there are, in one network or in all."""
    found = layers_of(NETWORKS if network is None else [network])
    return sum(family(layer) in families for layer in found)


def moving(operator: str) -> Judge:
    """Share of the copy's bandwidth, geometric mean over the shapes."""

    def judge(record: Row, dtype: str) -> Verdict | None:
        rate, found = copy_rate(record), rows(record, "bandwidth", operator=operator, dtype=dtype)
        if not found or rate is None:
            return None
        values = [row["work"][0] / p50(row["ms"]["ours"]) / rate for row in found]
        mean, total = geometric(values), sum(call.operator == operator for call in moving_calls(dtype))
        text = f"{mean:.0%} ({min(values):.0%} to {max(values):.0%}, {len(values)} of {total} cases)"
        return Verdict(text, mean >= 0.85, len(values) == total)

    return judge


def depthwise(record: Row, dtype: str) -> Verdict | None:
    network = "mobilenet_v2"
    every = rows(record, "dw", family="depthwise", dtype=dtype)
    values = speedups([row for row in every if network in row["networks"]], "dense", "0.125")
    if not values:
        return None
    total = layers_in("depthwise", network=network)
    text = f"{geometric(values):.1f}x ({len(values)} of {total} layers)"
    return Verdict(text, geometric(values) >= 5, len(values) == total)


def products(record: Row, dtype: str) -> list[Row]:
    return rows(record, "dw", family="linear", dtype=dtype) + rows(record, "dw", family="1x1", dtype=dtype)


def all_products(found: list[Row]) -> bool:
    return len(found) == layers_in("linear", "1x1")


def product_mean(record: Row, dtype: str) -> Verdict | None:
    found = products(record, dtype)
    values = speedups(found, "gather", None, 0.25)
    if not values:
        return None
    text = f"{geometric(values):.2f}x ({len(values)} cases)"
    return Verdict(text, geometric(values) >= 1.3, all_products(found))


def product_worst(record: Row, dtype: str) -> Verdict | None:
    found = products(record, dtype)
    return _never_slower(speedups(found, "gather", None, 0.25), all_products(found))


def _never_slower(values: list[float], complete: bool) -> Verdict | None:
    if not values:
        return None
    slower = sum(value < 1 / NOISE for value in values)
    text = f"{slower} of {len(values)} cases slower, at worst {1 / min(values):.2f}x the time"
    return Verdict(text, slower == 0, complete)


def product_reading(record: Row, dtype: str) -> Verdict | None:
    """Time over that of moving x and the selected dy once, where moving them takes longer than multiplying."""
    rate, multiply = copy_rate(record), product_rate(record, dtype)
    if rate is None or multiply is None:
        return None
    found, values = products(record, dtype), []
    for row in found:
        for share in shares_of(row, 0.25):
            nbytes, operations = row["work"][share]
            ours = fastest(row, "ours", share)
            if ours is not None and nbytes / rate > operations / multiply:
                values.append(ours / (nbytes / rate))
    if not values:
        return None
    within = sum(value <= 1.25 for value in values)
    text = f"{within} of {len(values)} cases, geometric mean {geometric(values):.2f}x"
    return Verdict(text, within == len(values), all_products(found))


def windows(record: Row, dtype: str) -> Verdict | None:
    found = rows(record, "dw", family="k x k", dtype=dtype)
    return _never_slower(speedups(found, "dense", None), len(found) == layers_in("k x k"))


def best(record: Row, network: str, dtype: str, name: str) -> Row | None:
    """A variant of a step in its faster layout."""
    found = [
        kinds[name] for row in rows(record, "step", network=network, dtype=dtype)
        for kinds in row["variants"].values() if name in kinds
    ]  # fmt: skip
    return min(found, key=lambda variant: p50(variant["ms"]), default=None)


def step(network: str, ours: str, dense: str, key: str, most: float) -> Judge:
    """Time ("ms") or peak of ours over that of dense, each in its faster layout."""

    def judge(record: Row, dtype: str) -> Verdict | None:
        pair = [best(record, network, dtype, name) for name in (ours, dense)]
        if pair[0] is None or pair[1] is None:
            return None
        values = [p50(variant["ms"]) if key == "ms" else variant["peak"] for variant in pair if variant]
        return Verdict(f"{values[0] / values[1]:.2f}x", values[0] <= most * values[1])

    return judge


def beats_checkpoints(record: Row, dtype: str) -> Verdict | None:
    ours, other = (best(record, "mobilenet_v2", dtype, name) for name in ("ours", "dense, checkpoints"))
    if ours is None or other is None:
        return None
    peak, time = ours["peak"] / other["peak"], p50(ours["ms"]) / p50(other["ms"])
    return Verdict(f"peak {peak:.2f}x, time {time:.2f}x", peak < 1 and time < 1)


MOBILENET, RESNET = "MobileNetV2 step, 10 % of every conv, batch norm frozen", "ResNet-50 step, same"
GOALS = (
    Goal("`response`", "≥ 85 % of a large copy's bandwidth", moving("response")),
    Goal("`affine_act` forward", "≥ 85 % of a large copy's bandwidth", moving("affine_act")),
    Goal("`affine_act` backward", "≥ 85 % of a large copy's bandwidth", moving("affine_act_dx")),
    Goal("depthwise dw at k/C = 1/8", "≥ 5x faster than dense, geometric mean over MobileNetV2", depthwise),
    Goal("`linear_dw` / 1x1 at k/C ≤ 1/4", "≥ 1.3x faster than gather + cuBLAS, geometric mean", product_mean),
    Goal("`linear_dw` / 1x1 at k/C ≤ 1/4", "never slower than gather + cuBLAS", product_worst),
    Goal("`linear_dw` / 1x1 at k/C ≤ 1/4", "≤ 1.25x of reading once, where that bounds it", product_reading),
    Goal("k x k `conv2d_dw`", "never slower than dense on any layer", windows),
    Goal(MOBILENET, "time ≤ 0.70x dense eager", step("mobilenet_v2", "ours", "dense", "ms", 0.7)),
    Goal(MOBILENET, "time ≤ 1.0x dense compiled", step("mobilenet_v2", "ours", "dense, compiled", "ms", 1.0)),
    Goal(
        MOBILENET, "time compiled ≤ 0.85x dense compiled",
        step("mobilenet_v2", "ours, compiled", "dense, compiled", "ms", 0.85),
    ),
    Goal(MOBILENET, "peak ≤ 0.25x dense eager", step("mobilenet_v2", "ours", "dense", "peak", 0.25)),
    Goal(MOBILENET, "peak ≤ 0.4x dense compiled", step("mobilenet_v2", "ours", "dense, compiled", "peak", 0.4)),
    Goal(MOBILENET, "peak below dense with checkpoints, in less time", beats_checkpoints),
    Goal(RESNET, "time ≤ 0.80x dense eager", step("resnet50", "ours", "dense", "ms", 0.8)),
    Goal(RESNET, "peak ≤ 0.55x dense eager", step("resnet50", "ours", "dense", "peak", 0.55)),
)  # fmt: skip


def judged(record: Row) -> list[tuple[Goal, dict[str, Verdict | None]]]:
    """Every goal in every precision."""
    return [(goal, {dtype: goal.judge(record, dtype) for dtype in PRECISIONS}) for goal in GOALS]


def goals_table(record: Row) -> list[str]:
    """The goals, and beside each what was measured."""
    lines = [f"| what | goal | {' | '.join(NAMES.values())} |", "|---|---|---|---|---|"]
    for goal, found in judged(record):
        cells = (NOT_MEASURED if verdict is None else str(verdict) for verdict in found.values())
        lines.append(f"| {goal.what} | {goal.goal} | {' | '.join(cells)} |")
    return lines
