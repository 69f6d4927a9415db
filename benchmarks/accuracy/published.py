"""What the paper printed (`published.json`) beside what was measured, where a plan repeats its setting.

A plan says "published": the number of the table; a method its row there as "published", if it is one; budgets are
matched by their weights, data sets by name. The printed rows spent other budgets than they say (METHOD 10, errors 1 to
3): what ours spent stands in the table of costs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.tables import row, shown


@cache
def printed() -> Mapping[str, Any]:
    """The source and its rows: table, model, budget, method, accuracy: data -> [mean, deviation]."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text())
    return found


def lookup(plan: Plan, cell: Cell) -> tuple[float, float] | None:
    """Mean and deviation in the plan's table; None if it has no such row."""
    name = plan.methods[cell.method].get("published")
    budget = None if cell.budget is None else plan.spends(cell.budget, cell.model).get("ours")
    for found in printed()["rows"]:
        same = (found["table"], found["model"], found["method"]) == (plan.published, cell.model, name)
        # Full training has its whole count as budget there, and none here.
        if same and (budget is None or str(found["budget"]) == budget) and cell.data in found["accuracy"]:
            mean, deviation = found["accuracy"][cell.data]
            return mean, deviation
    return None


def beside(plan: Plan, cells: Sequence[Cell]) -> str:
    """A table of printed and measured accuracy; empty where the plan repeats nothing."""
    lines = []
    for cell in cells:
        found = lookup(plan, cell) if plan.published else None
        if found and cell.accuracy:
            text = f"{found[0]:.2f} ± {found[1]:.2f}"
            gap = f"{cell.accuracy.mean - found[0]:+.2f}"
            lines.append(
                row([cell.data, cell.budget or "none", cell.method, text, shown(cell.accuracy), gap])
            )
    if not lines:
        return ""
    head = ["data", "budget", "method", "printed", "here", "difference"]
    return "\n".join(
        [
            f"Beside {printed()['source']} (table {plan.published}).",
            "",
            row(head),
            row(["---"] * 3 + ["--:"] * 3),
            *lines,
        ]
    )
