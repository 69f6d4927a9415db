"""Training and test accuracy over the epochs: what a selection that stays, or changes, does to the gap between them.

gap = training accuracy of the last epoch (augmented images, as trained on) - test accuracy after it
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.figures import styles
from benchmarks.accuracy.significance import spread
from benchmarks.accuracy.tables import row, shown
from benchmarks.figures import save
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot


def has_every_epoch(run: Mapping[str, Any]) -> bool:
    """Whether a run was tested after each of at least two epochs."""
    tested = run["accuracy_per_epoch"]
    return len(tested) > 1 and None not in tested


def followed(cells: Sequence[Cell]) -> list[Cell]:
    """The cells all of whose runs were tested after every epoch."""
    return [cell for cell in cells if cell.runs and all(has_every_epoch(run) for run in cell.runs)]


def gaps(cell: Cell) -> list[float]:
    """Of every run, in points."""
    return [100 * (run["train_accuracy_per_epoch"][-1] - run["accuracy_per_epoch"][-1]) for run in cell.runs]


def table(cells: Sequence[Cell]) -> str:
    """Accuracies of the last epoch and their gap."""
    head = ["data", "method", "budget", "training", "test", "gap, points", "best test epoch"]
    lines = [row(head), row(["---"] * 3 + ["--:"] * 4)]
    for cell in cells:
        train = spread([100 * run["train_accuracy_per_epoch"][-1] for run in cell.runs])
        test = spread([100 * run["accuracy_per_epoch"][-1] for run in cell.runs])
        best = statistics.fmean(
            1 + max(range(len(tested)), key=tested.__getitem__)
            for tested in (run["accuracy_per_epoch"] for run in cell.runs)
        )
        words = [cell.data, cell.method, cell.budget or "none", shown(train), shown(test)]
        lines.append(row([*words, shown(spread(gaps(cell))), f"{best:.1f}"]))
    return "\n".join(lines)


def draw(cells: Sequence[Cell], path: Path) -> str:
    """A panel per data set: test accuracy with marks, training accuracy without. Returns the name of the file."""
    plt = pyplot()
    data = list(dict.fromkeys(cell.data for cell in cells))
    look = styles(list(dict.fromkeys(cell.method for cell in cells)))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(data), figsize=(WIDTH_INCHES, 4.2), squeeze=False)
        for panel, name in zip(panels[0], data, strict=True):
            for cell in cells:
                if cell.data == name:
                    _curves(panel, cell, look[cell.method])
            panel.set_title(name)
            panel.set_xlabel("epoch")
            panel.grid(color="#dddddd", linewidth=0.6)
        panels[0][0].set_ylabel("accuracy (%); thin: training")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        save(figure, path)
    return path.name


def _curves(panel: Any, cell: Cell, look: Mapping[str, Any]) -> None:
    def mean(key: str) -> list[float]:
        return [100 * statistics.fmean(v) for v in zip(*(run[key] for run in cell.runs), strict=True)]

    tested = mean("accuracy_per_epoch")
    numbers = range(1, len(tested) + 1)
    panel.plot(numbers, tested, label=cell.method, markersize=4, linewidth=1.4, **look)
    thin = {**look, "marker": ""}
    panel.plot(numbers, mean("train_accuracy_per_epoch"), linewidth=0.7, **thin)
