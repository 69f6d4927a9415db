"""The few rows of a grid that the README shows, as a table and as a figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import figures
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
)


def _cells(records: Sequence[Mapping[str, Any]]) -> list[Cell]:
    return cells([record for record in records if record["stage"] == "run"])


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy per data set, and what the runs needed; rows that the grid does not have are left out."""
    found = _cells(records)
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


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against the memory of training, of the methods of the table at all budgets, on frozen statistics."""
    methods = {method for _, method, _, _ in ROWS}
    shown = [cell for cell in _cells(records) if cell.batch_norm == "bias" and cell.method in methods]
    figures.draw(shown, lambda cell: cell.training_mib, "memory of training (MiB)", path)


def _accuracy(mine: Sequence[Cell], name: str) -> str:
    found = [cell.accuracy for cell in mine if cell.data == name and cell.accuracy]
    return f"{shown(found[0])} ({found[0].count})" if found else ""


def _mean(mine: Sequence[Cell], key: str) -> float:
    return statistics.fmean(cell.mean(key) for cell in mine)
