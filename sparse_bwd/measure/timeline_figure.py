"""Figures of `memory.timeline`: allocated bytes over a step, stacked by kind; readable at 800 pixels and in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot

MIB = 2**20
# From dark to light, so that the order of the kinds can be told in grey as well; hatches tell neighbours apart.
KINDS = {
    "parameter": ("parameters", "#00204d", ""),
    "optimizer": ("optimizer state", "#31446b", "...."),
    "gradient": ("gradients", "#666970", "////"),
    "activation": ("kept for backward", "#cbba69", ""),
    "transient": ("transient", "#fdea9b", "xxxx"),
}


def draw_timelines(timelines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Several steps side by side: one panel per `Timeline.to_dict()` with a title.

    Each step has its own time scale: the profiler slows short operations most, so that lengths would mislead.
    """
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(timelines), sharex=True, sharey=True, figsize=(WIDTH_INCHES, 3.6)
        )
        for panel, timeline in zip(panels, timelines, strict=True):
            _stack(panel, timeline, 100 / timeline["ms"][-1], MIB)
            _mark_peak(panel, timeline, 100 / timeline["ms"][-1], MIB, "MiB")
            panel.set_title(timeline["title"])
        panels[0].set_ylabel("allocated memory (MiB)")
        panels[0].set_ylim(0, 1.12 * max(max(_total(timeline, MIB)) for timeline in timelines))
        panels[0].set_xlim(0, 100)
        panels[0].set_xticks([0, 25, 50, 75, 100])
        figure.get_layout_engine().set(wspace=0.05)
        figure.supxlabel("one training step: forward, backward, optimizer step (% of its time)", fontsize=10)
        _finish(plt, figure, panels[0], path)


def draw_step(timeline: Mapping[str, Any], title: str, path: Path) -> None:
    """One step, from `Timeline.to_dict()` of a step that was run in parts."""
    plt = pyplot()
    unit, scale = ("MiB", MIB) if max(_total(timeline, MIB)) >= 1 else ("KiB", 1024)
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(WIDTH_INCHES, 4.2))
        _stack(panel, timeline, 1, scale)
        highest = max(_total(timeline, scale))
        panel.set_ylim(0, 1.22 * highest)
        panel.set_xlim(0, timeline["ms"][-1])
        panel.set_ylabel(f"allocated memory ({unit})")
        panel.set_xlabel("time since the first allocation of the step, under the profiler (ms)")
        panel.set_title(title)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        _name_parts(panel, timeline["parts"], timeline["ms"][-1])
        _mark_peak(panel, timeline, 1, scale, f"{unit} above the start")
        _finish(plt, figure, panel, path)


def _finish(plt: Any, figure: Any, panel: Any, path: Path) -> None:
    """The legend, in the order in which the kinds are stacked, and the file."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside upper center",
        ncols=len(KINDS),
        frameon=False,
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _total(timeline: Mapping[str, Any], unit: int) -> list[float]:
    """All kinds together at each time."""
    return [sum(values) / unit for values in zip(*timeline["bytes"].values(), strict=True)]


def _stack(panel: Any, timeline: Mapping[str, Any], per_ms: float, unit: int) -> None:
    """The kinds, one upon the other."""
    at = [ms * per_ms for ms in timeline["ms"]]
    below = [0.0] * len(at)
    for kind, (label, colour, hatch) in KINDS.items():
        above = [low + value / unit for low, value in zip(below, timeline["bytes"][kind], strict=True)]
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


def _mark_peak(panel: Any, timeline: Mapping[str, Any], per_ms: float, unit: int, word: str) -> None:
    """How far the highest allocation is above what was alive before the step."""
    total, end = _total(timeline, unit), timeline["ms"][-1] * per_ms
    highest = max(total)
    at = timeline["ms"][total.index(highest)] * per_ms
    panel.annotate(
        f"peak {timeline['peak'] / unit:.0f} {word}",
        (min(max(at, 0.2 * end), 0.8 * end), highest),  # keeps the words within the panel
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _name_parts(panel: Any, parts: Mapping[str, float], end: float) -> None:
    """Where each part of the step begins, and its name above; a name that would meet its neighbour's goes lower."""
    starts = [*parts.values(), end]
    right = -end
    for name, start, stop in zip(parts, starts, starts[1:], strict=False):
        middle, width = (max(start, 0) + stop) / 2, 0.013 * end * len(name)
        middle = min(middle, end - width / 2)
        low = middle - width / 2 < right
        right = middle + width / 2
        if start > 0:
            panel.axvline(
                start, ymax=0.87 if low else 0.93, color="black", linewidth=0.8, linestyle=(0, (4, 3))
            )
        panel.text(
            middle, 0.9 if low else 0.965, name, transform=panel.get_xaxis_transform(), ha="center", va="center",
            fontsize=10,
        )  # fmt: skip
