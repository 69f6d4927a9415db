"""From accuracies to contributions: what training each part adds (METHOD 5.1)."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_bwd.training.search.points import Network, Point, label
from sparse_bwd.training.search.study import Measured


@dataclass(frozen=True)
class Contribution:
    """A part and its gain: mean over the seeds of the difference to the run without the part.

    n_bias, conv, ratio: as in Point. over: what the gain is over. error: standard error of the mean; None: one seed.
    """

    n_bias: int
    conv: int | None
    ratio: float
    name: str
    gain: float
    error: float | None
    accuracy: float
    over: str
    diverged: bool
    trained: int


def contributions(
    points: Sequence[Point], results: Mapping[str, Measured], network: Network
) -> list[Contribution]:
    """One per point, whatever its seeds: biases over the classifier alone, weights over the biases beside them."""
    found = []
    groups: dict[tuple[int, int | None, float], list[Point]] = {}
    for point in points:
        groups.setdefault((point.n_bias, point.conv, point.ratio), []).append(point)
    for (n_bias, conv, ratio), members in groups.items():
        if conv is None and n_bias == 0:
            continue
        without = [Point(n_bias if conv is not None else 0, None, 0.0, point.seed) for point in members]
        runs = [results[point.key] for point in members]
        gains = [run.accuracy - results[base.key].accuracy for run, base in zip(runs, without, strict=True)]
        found.append(
            Contribution(
                n_bias=n_bias,
                conv=conv,
                ratio=ratio,
                name=label(members[0], network.names),
                gain=statistics.fmean(gains),
                error=statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None,
                accuracy=statistics.fmean(run.accuracy for run in runs),
                over=label(without[0], network.names),
                diverged=any(run.diverged for run in runs),
                trained=runs[0].trained,
            )
        )
    return found


def spent(results: Mapping[str, Measured], points: Sequence[Point]) -> dict[str, Any]:
    """What measuring the points took, whichever process did it and in whichever part of the search."""
    runs = [results[point.key] for point in points]
    return {
        "runs": len(runs),
        "steps": sum(run.steps for run in runs),
        "seconds": round(sum(run.seconds for run in runs), 1),
    }
