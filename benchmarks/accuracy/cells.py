"""Finished runs by cell: all seeds of one point of the grid, with the means that tables and figures show."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.accuracy.significance import Spread, spread

MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """The runs of one point; `runs` came to an end, `failed` did not."""

    data: str
    model: str
    method: str
    budget: str | None
    batch_norm: str
    runs: tuple[Mapping[str, Any], ...]
    failed: tuple[Mapping[str, Any], ...]

    @property
    def accuracy(self) -> Spread | None:
        """In percent; None if no run came to an end."""
        return spread([100 * run["accuracy"] for run in self.runs]) if self.runs else None

    def mean(self, key: str) -> float:
        """Over the seeds."""
        return statistics.fmean(run[key] for run in self.runs)

    @property
    def training_mib(self) -> float:
        """What training adds to the network at its highest, measured."""
        return self.mean("training_bytes") / MIB


def cells(records: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """In the order in which their first runs were finished."""
    found: dict[tuple[str, str, str, str | None, str], list[Mapping[str, Any]]] = {}
    for record in records:
        data, model, method = record["data"], record["model"], record["method"]
        key = (data, model, method, record["budget"], record["batch_norm"])
        found.setdefault(key, []).append(record)
    return [Cell(*key, tuple(_ended(runs, True)), tuple(_ended(runs, False))) for key, runs in found.items()]


def _ended(runs: Iterable[Mapping[str, Any]], well: bool) -> list[Mapping[str, Any]]:
    return [run for run in runs if (run["accuracy"] is not None) == well]
