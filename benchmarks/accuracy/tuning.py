"""The learning rate of every group: equal trials on images held back from the training images.

The smallest rate whose mean accuracy is within a margin of the best. Held-back images are few, so that the best of
several good rates is chance, and the larger ones among them are those that fail with other seeds and budgets. A trial
that diverged or was refused counts as the worst.
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


def best_rate(means: Mapping[float, float], margin: float) -> float:
    """The smallest rate within `margin` of the best; `means` as of `mean_accuracies`."""
    best = max(means.values())
    return min(rate for rate, mean in means.items() if mean >= best - margin)
