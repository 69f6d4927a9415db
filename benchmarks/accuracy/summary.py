"""The few rows of a grid that the README shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.cells import MIB, Cell, cells
from benchmarks.accuracy.tables import row, shown

# Budget, method, batch-norm mode, and what the table calls it.
ROWS: tuple[tuple[str | None, str, str, str], ...] = (
    (None, "full", "train", "full, batch statistics"),
    (None, "full", "bias", "full, frozen statistics"),
    ("8.8%", "velocity", "bias", "velocity"),
    ("8.8%", "random", "bias", "random"),
    ("8.8%", "sparse update", "bias", "sparse update"),
    ("48MiB", "velocity, bytes, in", "bias", 'velocity, axis "in"'),
    ("48MiB", "random, bytes, in", "bias", 'random, axis "in"'),
    (None, "norm shifts only", "bias", "norm shifts only"),
    (None, "head only", "frozen", "head only"),
)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy per data set, and what the runs needed; rows that the grid does not have are left out."""
    found = cells([record for record in records if record["stage"] == "run"])
    data = list(dict.fromkeys(cell.data for cell in found))
    head = ["budget", "policy", *(f"{name}, %" for name in data), "weights", "saved MiB", "training MiB"]
    lines = [row(head), row(["---", "---", *("--:" for _ in head[2:])])]
    for *key, words in ROWS:
        budget = key[0]
        mine = [c for c in found if [c.budget, c.method, c.batch_norm] == key and c.runs]
        if mine:
            accuracies = [_accuracy(mine, name) for name in data]
            needs = [f"{_mean(mine, 'trained_weights'):,.0f}"]
            needs += [f"{_mean(mine, key) / MIB:.1f}" for key in ("saved_bytes", "training_bytes")]
            lines.append(row([budget or "none", words, *accuracies, *needs]))
    return "\n".join(lines)


def _accuracy(mine: Sequence[Cell], name: str) -> str:
    found = [cell.accuracy for cell in mine if cell.data == name and cell.accuracy]
    return f"{shown(found[0])} ({found[0].count})" if found else ""


def _mean(mine: Sequence[Cell], key: str) -> float:
    return statistics.fmean(cell.mean(key) for cell in mine)
