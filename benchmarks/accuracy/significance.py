"""How sure a mean or a difference is.

    mean over seeds      +- the sample standard deviation; [lo, hi]: 95 % bootstrap interval, 9,999 resamples
    difference of two    pairs over (data, budget, seed): the same images, the same budget, the same draws; p of a
    methods              two-sided sign-flip test of the pairs, corrected after Holm over all comparisons of a report

Pairs of one data set are not independent of each other: they share test images. A p value is therefore about these data
sets, not about others. Below MIN_PAIRS pairs, as from three seeds of one cell, none is given.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE, RESAMPLES, SEED = 0.95, 9999, 0
MIN_PAIRS = 6  # with five, the smallest two-sided p of the sign flips is 0.06

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Of one cell; deviation and interval are None for a single value."""

    count: int
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation and bootstrap interval of at least one value."""
    if len(values) < 2:
        return Spread(len(values), values[0], None, None)
    return Spread(len(values), statistics.fmean(values), statistics.stdev(values), interval(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of at least two values."""
    from scipy import stats

    if min(values) == max(values):
        return values[0], values[0]
    found = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
        method="percentile", random_state=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class Comparison:
    """One method against another: mean difference of their pairs, its interval, p and p after Holm."""

    first: str
    second: str
    batch_norm: str
    pairs: int
    difference: float
    interval: tuple[float, float] | None
    wins: int
    p: float | None
    corrected: float | None = None


def compare(records: Iterable[Record], methods: Sequence[Sequence[str]]) -> list[Comparison]:
    """Every pair of methods that have runs in common, within each batch-norm mode; p values corrected together."""
    finished = [record for record in records if record["accuracy"] is not None]
    found = []
    for mode in dict.fromkeys(record["batch_norm"] for record in finished):
        for first, second in methods:
            if (one := _paired(finished, first, second, mode)) is not None:
                found.append(one)
    corrected = holm([one.p for one in found])
    return [Comparison(**{**vars(one), "corrected": p}) for one, p in zip(found, corrected, strict=True)]


def _paired(records: Sequence[Record], first: str, second: str, mode: str) -> Comparison | None:
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in records:
        if record["batch_norm"] == mode and record["method"] in (first, second):
            unit = (record["data"], record["model"], record["budget"], record["seed"])
            cells.setdefault(unit, {})[record["method"]] = record["accuracy"]
    differences = [cell[first] - cell[second] for cell in cells.values() if len(cell) == 2]
    if not differences:
        return None
    known = len(differences) >= MIN_PAIRS
    return Comparison(
        first, second, mode, len(differences), statistics.fmean(differences),
        interval(differences) if len(differences) > 1 else None,
        sum(difference > 0 for difference in differences),
        sign_flip(differences) if known else None,
    )  # fmt: skip


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences under random signs: exact up to 13 pairs, else 9,999 draws."""
    from scipy import stats

    if not any(differences):
        return 1.0
    return float(
        stats.permutation_test(
            (np.asarray(differences),), np.mean, permutation_type="samples", n_resamples=RESAMPLES,
            alternative="two-sided", random_state=np.random.default_rng(SEED),
        ).pvalue
    )  # fmt: skip


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: the i-th smallest of m times m - i + 1, at least those before it, at most 1."""
    known = sorted((p, place) for place, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected
