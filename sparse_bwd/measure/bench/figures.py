"""Figures of a benchmark, as SVG or PNG: what a budget buys, who is best at what, and where it comes from by layer."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparse_bwd.measure.bench.asked import EVERYTHING, NOTHING
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot

Row = Mapping[str, Any]
MIB, GIGA = 2**20, 1e9
# Line, marker and colour of each policy and axis; told apart in grey by markers and dashes.
LINES = (
    ("-", "o", "#00204d"), ("--", "s", "#7c7b78"), ("-.", "^", "#31688e"), (":", "D", "#a59c74"), ("-", "v", "#575c6d"),
)  # fmt: skip
DENSE, OURS, OTHERS = "#000000", "#00204d", "#b3a55a"
MOST_BARS = 24


class Quantity(NamedTuple):
    """What is drawn against the budget; `values`: from a row the lowest, the middle and the highest value."""

    title: str
    axis: str
    values: Callable[[Row], tuple[float, ...]]
    relative: bool


def measured(found: Mapping[str, Any]) -> list[Row]:
    """The rows with figures."""
    return [row for row in found["rows"] if not row["error"]]


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of ours by policy and axis, in the order of budgets; nothing and everything belong to every policy."""
    ours = [row for row in rows if row["strategy"] == "ours"]
    chosen = [row for row in ours if row["budget"] not in (NOTHING, EVERYTHING)]
    found: dict[str, list[Row]] = {}
    for policy, axis in dict.fromkeys((row["policy"], row["axis"]) for row in chosen):
        mine = [row for row in ours if row["axis"] == axis]
        mine = [row for row in mine if row["policy"] in (policy, "frozen", "full")]
        found[f"{policy}, axis {axis}"] = mine
    return found


def budget_figure(found: Mapping[str, Any]) -> Any:
    """Time and peak against the budget, each over dense where dense has figures."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 3.3))
    for panel, quantity in zip(panels, quantities(found), strict=True):
        draw_budget(panel, found, quantity)
        panel.set_xlabel("budget")
        panel.set_ylabel(quantity.axis)
        panel.set_title(quantity.title)
    legend_below(figure, panels[0])
    return figure


def draw_budget(panel: Any, found: Mapping[str, Any], quantity: Quantity) -> None:
    """A quantity of ours against the budget, a line for each policy."""
    rows = measured(found)
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row["strategy"] == "ours"))
    for (label, line), (style, marker, colour) in zip(series(rows).items(), LINES * 3, strict=False):
        x = [budgets.index(row["budget"]) for row in line]
        y = [quantity.values(row)[1] for row in line]
        panel.plot(x, y, linestyle=style, marker=marker, color=colour, markersize=5, label=label)
        panel.vlines(
            x,
            *zip(*(quantity.values(row)[::2] for row in line), strict=True),
            color=colour,
            linewidth=1,
            alpha=0.5,
        )
    if quantity.relative:
        panel.axhline(1, color=DENSE, linewidth=1)
        panel.annotate("dense", (0, 1), xytext=(0, 3), textcoords="offset points", fontsize=9)
    panel.set_xticks(range(len(budgets)), budgets)
    panel.set_ylim(0, max(1.15 if quantity.relative else 0, panel.get_ylim()[1]))
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)


def legend_below(figure: Any, panel: Any) -> None:
    """What the lines of a panel mean, below all panels; nothing where it has none."""
    handles, labels = panel.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
        )


def quantities(found: Mapping[str, Any]) -> tuple[Quantity, Quantity]:
    """Time and peak of a step: over those of dense, or as they are where dense had no room."""
    dense = found["rows"][0]
    time, peak = "Time of a step", "Peak memory of a step"
    if dense["error"]:
        return (
            Quantity(time, "time (ms; median, p20 to p80)", lambda row: tuple(row["ms"]["step"]), False),
            Quantity(peak, "peak (MiB)", lambda row: (row["peak"] / MIB,) * 3, False),
        )
    return (
        Quantity(time, "time / dense (median, p20 to p80)", _relative_time, True),
        Quantity(peak, "peak / dense", lambda row: (row["peak"] / dense["peak"],) * 3, True),
    )


def _relative_time(row: Row) -> tuple[float, ...]:
    """p20, p50 and p80 over the median of dense in the same rounds."""
    return tuple(ms / row["dense_ms"]["step"][1] for ms in row["ms"]["step"])


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other beats in both coordinates, by the first one."""
    order = sorted(range(len(points)), key=lambda number: points[number])
    best, found = float("inf"), []
    for number in order:
        if points[number][1] < best:
            best = points[number][1]
            found.append(number)
    return found


def pareto_figure(found: Mapping[str, Any]) -> Any:
    """Time against peak of every row; the line joins those that no other beats in both."""
    plt = pyplot()
    rows = measured(found)
    time = quantities(found)[0]
    points = [(row["peak"] / MIB, time.values(row)[1]) for row in rows]
    figure, panel = plt.subplots(figsize=(WIDTH_INCHES, 4.4))
    edge = front(points)
    panel.step(
        *zip(*(points[number] for number in edge), strict=True), where="post", color="#999999", linewidth=1
    )
    for number, (row, point) in enumerate(zip(rows, points, strict=True)):
        ours = row["strategy"] == "ours"
        marker = "o" if ours else "*" if row["strategy"] == "dense" else "X"
        colour = OURS if ours else DENSE if row["strategy"] == "dense" else OTHERS
        panel.plot(
            *point,
            marker,
            color=colour,
            markersize=7,
            markeredgecolor="#000000",
            markeredgewidth=0.5,
            zorder=3,
        )
        if number in edge or not ours:
            panel.annotate(
                row["name"], point, xytext=(6, 4), textcoords="offset points", fontsize=8, color="#222222"
            )
    panel.set_xlabel("peak memory of a step (MiB)")
    panel.set_ylabel("time of a step / dense" if time.relative else "time of a step (ms)")
    panel.set_xlim(0, None)
    panel.set_ylim(0, None)
    panel.margins(x=0.12)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_title("Ours (dots) and alternatives (crosses); the line joins what nothing else beats in both")
    return figure


def layers_figure(found: Mapping[str, Any]) -> Any | None:
    """Bytes kept and operations of backward by part of the network, of dense and of a case of ours."""
    plt = pyplot()
    rows = [row for row in measured(found) if row["parts"]]
    ours = [row for row in rows if row["strategy"] == "ours" and row["budget"] not in (NOTHING, EVERYTHING)]
    if not ours or rows[0]["strategy"] != "dense":
        return None  # nothing to put side by side
    mine = ours[len(ours) // 2]
    groups = grouped([*rows[0]["parts"]["flops"], *rows[0]["parts"]["saved"]])
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(WIDTH_INCHES, 1.4 + 0.26 * len(groups)))
    for panel, (key, unit, name) in zip(panels, _LAYER_QUANTITIES, strict=True):
        for shift, row, colour, hatch in ((-0.2, rows[0], OTHERS, ""), (0.2, mine, OURS, "")):
            sizes = [
                sum(row["parts"][key].get(layer, 0) for layer in group) / unit for group in groups.values()
            ]
            places = [place + shift for place in range(len(groups))]
            panel.barh(places, sizes, height=0.38, color=colour, hatch=hatch, label=row["name"])
        panel.set_xlabel(name)
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(groups)), list(groups), fontsize=9)
    panels[0].set_ylim(len(groups) - 0.4, -0.6)
    panels[0].set_title("Kept for backward")
    panels[1].set_title("Operations of backward")
    legend_below(figure, panels[0])
    return figure


_LAYER_QUANTITIES = (("saved", MIB, "saved (MiB)"), ("flops", GIGA, "GFLOPs"))


def grouped(names: Sequence[str]) -> dict[str, list[str]]:
    """Layers by the beginning of their names: as many groups as there can be up to MOST_BARS, by the shortest words."""
    unique = list(dict.fromkeys(names))
    deepest = max((name.count(".") + 1 for name in unique), default=1)
    count = {depth: len({_first(name, depth) for name in unique}) for depth in range(1, deepest + 1)}
    depth = max(count, key=lambda depth: (depth == 1 or count[depth] <= MOST_BARS, count[depth], -depth))
    found: dict[str, list[str]] = {}
    for name in unique:
        found.setdefault(_first(name, depth), []).append(name)
    return found


def _first(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:depth])


def draw(
    make: Callable[[Mapping[str, Any]], Any], found: Mapping[str, Any], kind: str = "svg"
) -> bytes | None:
    """A figure as a file of a kind that matplotlib knows; None where there is nothing to draw."""
    plt = pyplot()

    with plt.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": "sparse_bwd"}):
        figure = make(found)
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
        plt.close(figure)
    return buffer.getvalue()
