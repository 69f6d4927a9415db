"""The learning rate of every group: equal trials on images held back from the training images, the best one taken.

A trial that diverged or was refused counts as the worst. Equal accuracies: the smaller rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

_WORST = -1.0


def mean_accuracies(trials: Iterable[Mapping[str, Any]]) -> dict[float, float]:
    """Learning rate -> mean accuracy of its trials, in the order of the rates."""
    found: dict[float, list[float]] = {}
    for trial in trials:
        accuracy = trial["accuracy"]
        found.setdefault(trial["lr"], []).append(_WORST if accuracy is None else accuracy)
    return {rate: statistics.fmean(found[rate]) for rate in sorted(found)}


def best_rate(means: Mapping[float, float]) -> float:
    """The rate with the largest mean; `means` as of `mean_accuracies`."""
    return max(means, key=lambda rate: (means[rate], -rate))
