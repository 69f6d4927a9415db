"""The figure of accuracy in the README, from the JSON that `demo.py` writes; readable at 800 pixels and in grey."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend is chosen first: no display is needed

from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES

MIB = 2**20
# Marker and colour of each policy; the colours run from dark to light.
POLICIES = {
    "dense, NCHW": ("s", "#000000"),
    "dense, channels_last": ("D", "#000000"),
    "full": ("o", "#440154"),
    "velocity": ("^", "#31688e"),
    "random": ("v", "#1f9e89"),
    "sparse update": ("P", "#8a6d00"),
    "head only": ("X", "#7f7f7f"),
}


def draw_accuracy(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy (mean and range over the seeds) against the peak bytes of a step, one mark per row of the table."""
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(WIDTH_INCHES, 4.2))
        for row in rows:
            _mark(panel, row)
        panel.set_xlim(0, 1.06 * max(row["peak"] for row in rows) / MIB)
        panel.set_xlabel("peak memory of one training step (MiB)")
        panel.set_ylabel("accuracy on the new digits (%)")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.8)
        save(figure, path)


def _mark(panel: Any, row: Mapping[str, Any]) -> None:
    """One point with the range over its seeds: hollow for axis "in", larger for a larger budget."""
    marker, colour = POLICIES[row["policy"]]
    mean = statistics.mean(row["accuracy"])
    share = row["cost"] / row["weights"]
    label = row["policy"]
    if 0 < share < 1:
        label += f' {100 * share:.0f} %, "{row["axis"]}"'
    panel.errorbar(
        row["peak"] / MIB,
        mean,
        yerr=[[mean - min(row["accuracy"])], [max(row["accuracy"]) - mean]],
        fmt=marker,
        color=colour,
        markerfacecolor="white" if row["axis"] == "in" else colour,
        markersize=10 if share > 0.2 else 6.5,
        elinewidth=1,
        label=label,
    )


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
