"""The figures of the README, drawn from the JSON that `demo.py` writes; readable at 800 pixels and in grey."""

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
# From dark to light, so that the order of the kinds can be told in grey as well; hatches tell neighbours apart.
KINDS = {
    "parameter": ("parameters", "#00204d", ""),
    "optimizer": ("optimizer state", "#31446b", "...."),
    "gradient": ("gradients", "#666970", "////"),
    "activation": ("kept for backward", "#cbba69", ""),
    "transient": ("transient", "#fdea9b", "xxxx"),
}
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


def draw_timelines(timelines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Allocated bytes over one training step, stacked by kind: one panel per `Timeline.to_dict()` with a title.

    Each step has its own time scale: the profiler slows short operations most, so that lengths would mislead.
    """
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(timelines), sharex=True, sharey=True, figsize=(WIDTH_INCHES, 3.6)
        )
        for panel, timeline in zip(panels, timelines, strict=True):
            _stack(panel, timeline)
        panels[0].set_ylabel("allocated memory (MiB)")
        panels[0].set_ylim(0, 1.12 * max(max(_total(timeline)) for timeline in timelines))
        panels[0].set_xlim(0, 100)
        panels[0].set_xticks([0, 25, 50, 75, 100])
        figure.get_layout_engine().set(wspace=0.05)
        figure.supxlabel("one training step: forward, backward, optimizer step (% of its time)", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles[::-1],
            labels[::-1],
            loc="outside upper center",
            ncols=len(KINDS),
            frameon=False,
            fontsize=9,
        )
        save(figure, path)


def _total(timeline: Mapping[str, Any]) -> list[float]:
    """MiB of all kinds together at each time."""
    return [sum(values) / MIB for values in zip(*timeline["bytes"].values(), strict=True)]


def _stack(panel: Any, timeline: Mapping[str, Any]) -> None:
    at = [100 * ms / timeline["ms"][-1] for ms in timeline["ms"]]
    below = [0.0] * len(at)
    for kind, (label, colour, hatch) in KINDS.items():
        above = [low + value / MIB for low, value in zip(below, timeline["bytes"][kind], strict=True)]
        panel.fill_between(
            at,
            below,
            above,
            step="post",
            facecolor=colour,
            hatch=hatch,
            edgecolor="#00000060",
            linewidth=0,
            label=label,
        )
        below = above
    panel.step(at, below, where="post", color="black", linewidth=0.8)
    highest = max(below)
    panel.annotate(
        f"peak {timeline['peak'] / MIB:.0f} MiB",
        (min(max(at[below.index(highest)], 20), 80), highest),  # keeps the words within the panel
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
    panel.set_title(timeline["title"])


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
