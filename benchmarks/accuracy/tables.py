"""Markdown tables of a grid: accuracy as in the paper (rows: budget and method, columns: data), and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.accuracy.cells import MIB, Cell
from benchmarks.accuracy.significance import MIN_PAIRS, Comparison, Spread
from benchmarks.accuracy.tuning import best_rate


def accuracy_table(cells: Sequence[Cell]) -> str:
    """Mean +- deviation over the seeds, in percent; the best of a budget and data set is bold."""
    data = list(dict.fromkeys(cell.data for cell in cells))
    best = _best(cells)
    lines = [row(["budget", "method", *data]), row(["---", "---", *("--:" for _ in data)])]
    for budget, method in _rows(cells):
        line = [budget or "none", method]
        for name in data:
            found = [c for c in cells if (c.budget, c.method, c.data) == (budget, method, name)]
            line.append(_cell(found[0], found[0] in best) if found else "")
        lines.append(row(line))
    return "\n".join(lines)


def _rows(cells: Sequence[Cell]) -> list[tuple[str | None, str]]:
    """Budgets together, each in the order of the methods' first runs; without a budget last."""
    rows = list(dict.fromkeys((cell.budget, cell.method) for cell in cells))
    budgets = sorted({budget for budget, _ in rows}, key=lambda budget: budget_order(cells, budget))
    return [row for budget in budgets for row in rows if row[0] == budget]


def budget_order(cells: Sequence[Cell], budget: str | None) -> tuple[int, float, str]:
    """Budgets of weights first, each kind by size; none last."""
    if budget is None:
        return (2, 0.0, "")
    digits = "".join(c for c in budget if c.isdigit() or c == ".")
    return (int(budget.endswith("B")), float(digits or 0), budget)


def _best(cells: Sequence[Cell]) -> list[Cell]:
    """The cell of the largest mean in every budget and data set that has more than one method."""
    found = []
    for group in {(cell.budget, cell.data) for cell in cells if cell.budget}:
        members = [c for c in cells if (c.budget, c.data) == group and c.accuracy is not None]
        if len(members) > 1:
            found.append(max(members, key=lambda c: c.accuracy.mean if c.accuracy else 0.0))
    return found


def _cell(cell: Cell, best: bool) -> str:
    if cell.accuracy is None:
        return str(cell.failed[0]["failed"])
    text = shown(cell.accuracy)
    count = cell.accuracy.count
    seeds = f" ({count} seed{'s' * (count > 1)})" if count != 3 else ""
    failed = f"; {len(cell.failed)} {cell.failed[0]['failed']}" if cell.failed else ""
    return (f"**{text}**" if best else text) + seeds + failed


def shown(value: Spread) -> str:
    """Mean +- deviation."""
    deviation = "" if value.deviation is None else f" ± {value.deviation:.1f}"
    return f"{value.mean:.1f}{deviation}"


def cost_table(cells: Sequence[Cell]) -> str:
    """What every cell trains and needs: means over data sets and seeds."""
    head = ["budget", "method", "weights trained", "channels / layers", "saved MiB", "peak MiB", "training MiB",
            "backward GFLOPs"]  # fmt: skip
    lines = [row(head), row(["---", "---", *("--:" for _ in head[2:])])]
    for budget, method in _rows(cells):
        found = [c for c in cells if (c.budget, c.method) == (budget, method) and c.runs]
        if not found:
            continue

        def mean(key: str, members: Sequence[Cell] = found) -> float:
            return sum(cell.mean(key) for cell in members) / len(members)

        lines.append(
            row(
                [
                    budget or "none", method, f"{mean('trained_weights'):,.0f}",
                    f"{mean('channels'):,.0f} / {mean('layers'):.0f}", f"{mean('saved_bytes') / MIB:.1f}",
                    f"{mean('peak_bytes') / MIB:.1f}", f"{mean('training_bytes') / MIB:.1f}",
                    f"{mean('backward_flops') / 1e9:.2f}",
                ]
            )
        )  # fmt: skip
    return "\n".join(lines)


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Differences in percentage points."""
    head = [
        "first",
        "second",
        "norms",
        "pairs",
        "first better",
        "difference, points",
        "95 % interval",
        "p",
        "p (Holm)",
    ]
    lines = [row(head), row(["---", "---", "---", *("--:" for _ in head[3:])])]
    for one in comparisons:
        between = (
            "" if one.interval is None else f"{100 * one.interval[0]:+.1f} to {100 * one.interval[1]:+.1f}"
        )
        lines.append(
            row(
                [
                    one.first, one.second, one.batch_norm, str(one.pairs), f"{one.wins}",
                    f"{100 * one.difference:+.1f}", between, p_value(one.p), p_value(one.corrected),
                ]
            )
        )  # fmt: skip
    return "\n".join(lines)


def p_value(value: float | None) -> str:
    """For people."""
    if value is None:
        return f"< {MIN_PAIRS} pairs"
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def rate_table(rates: Sequence[tuple[str, dict[str, dict[float, float]]]]) -> str:
    """Validation accuracy of every learning rate, per method and data set; the chosen one is bold."""
    lines = []
    data = list(dict.fromkeys(name for _, found in rates for name in found))
    tried = sorted({rate for _, found in rates for means in found.values() for rate in means})
    head = ["method", *(f"{name}, lr {rate:g}" for name in data for rate in tried)]
    lines = [row(head), row(["---", *("--:" for _ in head[1:])])]
    for method, found in rates:
        line = [method]
        for name in data:
            means = found.get(name, {})
            top = best_rate(means) if means else None
            for rate in tried:
                text = f"{100 * means[rate]:.1f}" if rate in means else ""
                line.append(f"**{text}**" if rate == top else text)
        lines.append(row(line))
    return "\n".join(lines)


def row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
