"""The figure of `benchmarks.accuracy`: accuracy against the memory of training, one line per way to choose."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.figures import MIB, save
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES

# Marker, line and colour of each family of cases; hollow on axis "out". What has no budget is a single point.
FAMILIES: dict[str, tuple[str, Any, str]] = {
    "velocity, bytes, in": ("^", "-", "#31688e"),
    "velocity, bytes, out": ("^", "--", "#31688e"),
    "velocity, weights, out": ("v", ":", "#6a3d9a"),
    "random, bytes, in": ("o", "-", "#1f9e89"),
    "random, bytes, out": ("o", "--", "#1f9e89"),
    "trady, bytes, in": ("s", "-", "#8a6d00"),
    "sparse-update, in": ("P", "-", "#000000"),
    "full": ("D", "", "#440154"),
    "head only": ("X", "", "#7f7f7f"),
}


def family(case: str) -> str:
    """The case without its budget, which is the last word of those that have one."""
    return case if case in FAMILIES else case.rpartition(" ")[0]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Mean over the seeds and their range, for every family of cases; returns the name of the file."""
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(WIDTH_INCHES, 4.6))
        for name, (marker, line, colour) in FAMILIES.items():
            points = sorted(
                (row["training_bytes"] / MIB, [100 * a for a in row["accuracy"]])
                for row in rows
                if family(row["case"]) == name
            )
            if points:
                _line(panel, points, name, marker, line, colour)
        panel.set_xlim(left=0)
        panel.set_xlabel("memory that training adds to the network, measured (MiB)")
        panel.set_ylabel("test accuracy (%)")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.8)
        save(figure, path)
    return path.name


def _line(
    panel: Any, points: Sequence[tuple[float, list[float]]], name: str, marker: str, line: Any, colour: str
) -> None:
    means = [statistics.fmean(accuracy) for _, accuracy in points]
    below = [mean - min(accuracy) for mean, (_, accuracy) in zip(means, points, strict=True)]
    above = [max(accuracy) - mean for mean, (_, accuracy) in zip(means, points, strict=True)]
    panel.errorbar(
        [size for size, _ in points],
        means,
        yerr=[below, above],
        marker=marker,
        linestyle=line,
        color=colour,
        markerfacecolor="white" if name.endswith("bytes, out") else colour,
        markersize=6.5,
        elinewidth=0.8,
        capsize=2,
        label=name,
    )
