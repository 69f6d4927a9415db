"""The page and the figure of `benchmarks.scaling`, from its JSON; readable at 800 pixels and in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from benchmarks.figures import save
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES

Json = Mapping[str, Any]
MIB = 2**20
LOOKS = {"dense": ("s", "#8a8a8a", "dense"), "ours": ("o", "#00204d", "ours")}
# The operations that the lower panels show, from dark to light.
SHOWN = {
    "velocity": ("^", "#00204d", "choosing by velocity"),
    "random": ("v", "#31688e", "choosing at random"),
    "apply with an optimizer": ("o", "#1f9e89", "apply, twice"),
    "convert": ("D", "#8a6d00", "convert"),
    "predict": ("X", "#666970", "predict"),
    "random, bytes": ("<", "#31688e", "random, budget in bytes"),
    "velocity, bytes": (">", "#00204d", "velocity, budget in bytes"),
    "forward of the probe": ("s", "#8a8a8a", "forward of the probe"),
    "round of velocity": ("P", "#00204d", "round of velocity"),
}
TITLES = {
    "weights": "weights, on meta", "layers": "layers, on meta", "channels": "channels, on meta",
    "bytes": "fake steps, on meta", "velocity": "weights, measured",
}  # fmt: skip


def page(record: Json) -> str:
    """The results as Markdown."""
    where = record["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in where["versions"].items())
    faster = "; ".join(record["faster"])
    parts = [
        "# How time and memory grow",
        f"Times of steps are medians of {record['rounds']} interleaved rounds on one thread; operators: "
        f"{record['implementation']}. Exponents are slopes of log y against log x by least squares, with their "
        "standard error, on the upper part of the range: from the first point from which on y is three times its first "
        "value, at least the last three points. `benchmarks/scaling.py` has the networks and the formulas."
        + (" **Tiny sizes: the exponents say nothing.**" if record["quick"] else ""),
        f"![Time and memory against every size](./{record['figure']})",
        *([_steps(record)] if record["steps"] else []),
        *_limits(record["steps"]),
        *[_plan(name, plan) for name, plan in record["plans"].items()],
        "Grows faster than it may: " + (f"**{faster}**." if faster else "nothing."),
        f"Commit {record['commit']}, {record['date']}, {where['processor']}, threads {where['threads']}; {versions}; "
        f"{record['seconds']} s.\n\n```\n{record['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _cell(fit: Json) -> str:
    return f"{fit['exponent']:.2f} ± {fit['error']:.2f}"


def _steps(record: Json) -> str:
    lines = [
        "## Training steps",
        "",
        "| against | | time | saved | peak | predicted peak | largest gap of the prediction |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for sweep in record["steps"].values():
        expected = sweep["expected"]
        lines.append(
            f"| {sweep['label']}, {sweep['x'][0]} to {sweep['x'][-1]} | by the formulas, at most "
            f"| {expected['time']} | {expected['saved']} | {expected['peak']} | {expected['predicted']} | |"
        )
        for variant, fits in sweep["fits"].items():
            gap = max(abs(row["predicted"] / row["peak"] - 1) for row in sweep[variant])
            cells = " | ".join(_cell(fits[key]) for key in ("time", "saved", "peak", "predicted"))
            lines.append(f"| | {variant} | {cells} | {100 * gap:.1f} % |")
    return "\n".join(lines)


def _limits(steps: Json) -> list[str]:
    """What the fits say beyond the points, and what is measured or predicted there."""
    found = []
    if "limits" in steps.get("selected", {}):
        limits = steps["selected"]["limits"]
        dense = [row["time"][1] for row in steps["selected"]["dense"]]
        middle = sorted(dense)[len(dense) // 2]
        rise = limits["time_at_all"] / limits["time_at_0"]
        found.append(
            f"As k goes to 0 the time goes to {limits['time_at_0']:.1f} ms by the straight line through all k; forward "
            f"and dx alone, with one channel of the first layer trained, take {limits['floor']:.1f} ms "
            f"({limits['floor'] / middle:.2f} of dense; two of three GEMMs are 0.67). With all channels it is "
            f"{rise:.2f} times that by the line, 1.5 by the GEMMs."
        )
        found.append(
            f"As k goes to C the peak goes to {limits['peak_at_all'] / MIB:.2f} MiB by the line through k <= C/2; "
            f"measured {limits['measured_peak_at_all'] / MIB:.2f}, predicted "
            f"{limits['predicted_peak_at_all'] / MIB:.2f}."
        )
    for variant, limit in steps.get("batch", {}).get("limits", {}).items():
        found.append(
            f"Largest batch whose step peaks at 1 GiB, {variant}: {limit['fitted']} by the line through the measured "
            f"peaks, {limit['predicted']} by `memory.predict` (to one in a hundred)."
        )
    return ["\n".join(f"- {text}" for text in found)] if found else []


def _plan(name: str, plan: Json) -> str:
    sizes = plan["x"]
    shown = [0, len(sizes) // 2, len(sizes) - 1]
    lines = [
        f"## {TITLES[name].capitalize()}",
        "",
        "| | " + " | ".join(f"ms at {sizes[i]:,}" for i in shown) + " | exponent | passes up to |",
        "|---|" + "--:|" * (len(shown) + 2),
    ]
    for operation, times in plan["times"].items():
        fit = plan["fits"][operation]
        cells = " | ".join(f"{times[i][0]:.3g}" for i in shown)
        lines.append(f"| {operation} | {cells} | {_cell(fit)} | {fit['limit']} |")
    return "\n".join([*lines, "", f"Against {plan['label']}; 20th percentiles."])


def draw(record: Json, path: Path) -> None:
    """Steps in two rows, time and memory; below what happens between them."""
    steps, plans = record["steps"], record["plans"]
    with plt.rc_context({**STYLE, "font.size": 8, "axes.titlesize": 9, "lines.markersize": 4}):
        figure = plt.figure(figsize=(WIDTH_INCHES, 8.6))
        above, below = figure.subfigures(2, 1, height_ratios=[5, 3.5])
        if steps:
            panels = above.subplots(2, len(steps), squeeze=False, sharex="col", sharey="row")
            for place, (name, sweep) in enumerate(steps.items()):
                _time(panels[0, place], name, sweep)
                _memory(panels[1, place], sweep)
            panels[0, 0].set_ylabel("time of a step (ms)")
            panels[1, 0].set_ylabel("memory of a step (MiB)")
            _legend(above, panels[1], 6, "outside upper center")
            above.align_ylabels()
        if plans:
            lower = below.subplots(1, len(plans), squeeze=False, sharey=True)[0]
            for panel, (name, plan) in zip(lower, plans.items(), strict=True):
                _between(panel, name, plan)
            lower[0].set_ylabel("time between steps (ms)")
            _legend(below, lower, 5, "outside lower center")
        save(figure, path)


def _legend(figure: Any, panels: Any, columns: int, where: str) -> None:
    """One legend for all panels, each label once."""
    named: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc=where, ncols=columns, frameon=False, columnspacing=1.2)


def _time(panel: Any, name: str, sweep: Json) -> None:
    for variant, (marker, colour, label) in LOOKS.items():
        low, middle, high = zip(*[row["time"] for row in sweep[variant]], strict=True)
        panel.fill_between(sweep["x"], low, high, color=colour, alpha=0.2, linewidth=0)
        panel.plot(sweep["x"], middle, marker=marker, color=colour, label=label)
    if "floor" in sweep.get("limits", {}):
        floor = sweep["limits"]["floor"]
        panel.axhline(floor, color="black", linestyle=":", linewidth=1)
        where = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "va": "top",
            "ha": "right",
        }
        panel.annotate("dotted: forward\nand dx alone", (0.97, floor), xytext=(0, -14), fontsize=7, **where)
    panel.set_title(name)
    _style(panel, sweep["x"], _exponents(sweep, "time"))


def _memory(panel: Any, sweep: Json) -> None:
    for variant, (marker, colour, label) in LOOKS.items():
        peak, saved, predicted = (
            [row[key] / MIB for row in sweep[variant]] for key in ("peak", "saved", "predicted")
        )
        panel.plot(sweep["x"], peak, marker=marker, color=colour, label=f"{label}, peak")
        panel.plot(sweep["x"], saved, linestyle="--", color=colour, label=f"{label}, saved")
        panel.plot(
            sweep["x"],
            predicted,
            marker="+",
            markersize=8,
            linestyle="",
            color="black",
            label="predicted peak",
        )
    panel.set_xlabel(sweep["label"].replace(", ", ",\n"))
    _style(panel, sweep["x"], _exponents(sweep, "peak"))


def _exponents(sweep: Json, quantity: str) -> str:
    """Words for a corner: the fitted exponents, and the largest by the formulas."""
    lines = [f"{variant} {sweep['fits'][variant][quantity]['exponent']:.2f}" for variant in LOOKS]
    return "\n".join([*lines, f"formula ≤ {sweep['expected'][quantity]}"])


def _between(panel: Any, name: str, plan: Json) -> None:
    for operation, (marker, colour, label) in SHOWN.items():
        if operation in plan["times"]:
            values = [row[0] for row in plan["times"][operation]]
            panel.plot(plan["x"], values, marker=marker, color=colour, label=label)
    panel.set_title(TITLES[name])
    panel.set_xlabel(plan["label"].replace(" of ", "\nof "))
    steepest = max(fit["exponent"] for fit in plan["fits"].values())
    _style(panel, plan["x"], f"steepest {steepest:.2f}")


def _style(panel: Any, x: Sequence[int], text: str) -> None:
    """Both axes logarithmic, a light grid, few ticks, and the exponents where the lines do not run."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = [x[0], x[len(x) // 2], x[-1]]
    panel.set_xticks(ticks, [_size(value) for value in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.text(0.04, 0.98, text, transform=panel.transAxes, va="top", fontsize=7, linespacing=1.25)


def _size(value: int) -> str:
    """A tick's words: 1024, 1.2M, a power of ten."""
    if value < 10_000:
        return str(value)
    digits = len(str(value)) - 1
    return f"$10^{{{digits}}}$" if value == 10**digits else f"{value / 10**6:g}M"
