"""Accuracy against the weights trained, the memory of training, and its time: one panel per data set, one line per
method, the means and ranges of its seeds; in grey the front of what no other cell beats in both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.tables import budget_order
from benchmarks.figures import save
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot

# Told apart by marker and line, so that grey is enough; colours run from dark to light.
_MARKERS = ("o", "^", "P", "v", "s", "D", "X", "<", ">", "p", "*", "h")
_LINES = ("-", "--", ":", "-.")
_COLOURS = ("#000000", "#31688e", "#8a6d00", "#1f9e89", "#6a3d9a", "#b2522d", "#7f7f7f")

Place = Callable[[Cell], float]


def styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Marker, line and colour of every method, the same in all figures of a report."""
    return {
        method: {
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _LINES[number % len(_LINES)],
            "color": _COLOURS[number % len(_COLOURS)],
        }
        for number, method in enumerate(methods)
    }


def draw(cells: Sequence[Cell], place: Place, label: str, path: Path, front: bool = True) -> str:
    """One figure; `place` is the horizontal position of a cell. Returns the name of the file."""
    plt = pyplot()
    shown = [cell for cell in cells if cell.runs]
    methods = list(dict.fromkeys(cell.method for cell in cells))
    look = styles(methods)
    data = list(dict.fromkeys(cell.data for cell in shown))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(data), figsize=(WIDTH_INCHES, 4.4), squeeze=False, sharex=True)
        for panel, name in zip(panels[0], data, strict=True):
            mine = [cell for cell in shown if cell.data == name]
            if front:
                _draw_front(panel, mine, place)
            for method in methods:
                _draw_method(panel, [c for c in mine if c.method == method], place, method, look[method])
            panel.set_title(name)
            panel.set_xlabel(label)
            panel.grid(color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
        panels[0][0].set_ylabel("test accuracy (%)")
        # Once for all panels, when all are drawn: a limit that is set no longer grows with what comes later.
        panels[0][0].set_xlim(left=0)
        handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
        for panel in panels[0][1:]:
            handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5
        )
        save(figure, path)
    return path.name


def _draw_method(panel: Any, cells: Sequence[Cell], place: Place, name: str, look: dict[str, Any]) -> None:
    points = sorted(cells, key=lambda cell: budget_order(cells, cell.budget))
    if not points:
        return
    accuracies = [[100 * run["accuracy"] for run in cell.runs] for cell in points]
    means = [sum(values) / len(values) for values in accuracies]
    panel.errorbar(
        [place(cell) for cell in points], means,
        yerr=[[m - min(a) for m, a in zip(means, accuracies, strict=True)],
              [max(a) - m for m, a in zip(means, accuracies, strict=True)]],
        markersize=5.5, elinewidth=0.7, linewidth=1.2, capsize=1.5, label=name, **look,
    )  # fmt: skip


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, gain) that no other point beats in one without losing in the other, by growing cost."""
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def _draw_front(panel: Any, cells: Sequence[Cell], place: Place) -> None:
    points = pareto([(place(cell), cell.accuracy.mean) for cell in cells if cell.accuracy])
    if len(points) < 2:
        return
    # A front is a staircase: between two of its points only the cheaper one can be had.
    stairs = [points[0], *itertools.chain(*(((b[0], a[1]), b) for a, b in itertools.pairwise(points)))]
    panel.plot(*zip(*stairs, strict=True), color="#bbbbbb", linewidth=5, alpha=0.6, zorder=0)
