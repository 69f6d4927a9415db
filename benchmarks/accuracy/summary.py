"""The few rows of a grid that the README shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.cells import MIB, Cell, cells
from benchmarks.accuracy.tables import row, shown

# Budget and method, in the order of the table.
ROWS: tuple[tuple[str | None, str], ...] = (
    (None, "full"),
    ("8.8%", "velocity"),
    ("8.8%", "random"),
    ("8.8%", "sparse update"),
    ("72MiB", "velocity, bytes, in"),
    ("72MiB", "random, bytes, in"),
    (None, "norm shifts only"),
    (None, "head only"),
)


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy per data set, and what the runs needed; rows that the grid does not have are left out."""
    found = cells([r for r in records if r["stage"] == "run" and r["batch_norm"] in ("bias", "frozen")])
    data = list(dict.fromkeys(cell.data for cell in found))
    head = ["budget", "policy", *(f"{name}, %" for name in data), "weights", "saved MiB", "training MiB"]
    lines = [row(head), row(["---", "---", *("--:" for _ in head[2:])])]
    for budget, method in ROWS:
        mine = [cell for cell in found if (cell.budget, cell.method) == (budget, method) and cell.runs]
        if mine:
            accuracies = [_accuracy(mine, name) for name in data]
            needs = [f"{_mean(mine, 'trained_weights'):,.0f}"]
            needs += [f"{_mean(mine, key) / MIB:.1f}" for key in ("saved_bytes", "training_bytes")]
            lines.append(row([budget or "none", method, *accuracies, *needs]))
    return "\n".join(lines)


def _accuracy(mine: Sequence[Cell], name: str) -> str:
    found = [cell.accuracy for cell in mine if cell.data == name and cell.accuracy]
    return f"{shown(found[0])} ({found[0].count})" if found else ""


def _mean(mine: Sequence[Cell], key: str) -> float:
    return statistics.fmean(cell.mean(key) for cell in mine)
