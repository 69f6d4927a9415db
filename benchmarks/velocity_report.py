"""The page and the figure of `benchmarks.velocity`, from its JSON; readable at 800 pixels and in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.figures import save
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES

Row = Mapping[str, Any]
# Marker, line and colour of each way that comes in several sizes.
SIZED = {
    "sketch": ("o", "-", "#000000", "sketch"),
    "sampled": ("^", "--", "#31688e", "sampled positions"),
    "product": ("X", ":", "#8a6d00", "sketch, product form"),
}
# Line and colour of what has no size to choose.
LEVELS: dict[str, tuple[Any, str, str]] = {
    "another probe": ((0, (6, 2)), "#7f7f7f", "another probe of 10 images"),
    "smooth noise": ((0, (1, 1)), "#7f7f7f", "probe of smooth noise"),
}
WORDS = {
    "exact float32": "exact, float32 (the reference)",
    "exact float16": "exact, float16",
    "another probe": "exact, another probe of real images: the noise floor",
    "smooth noise": "exact, probe of smooth noise",
    "white noise": "exact, probe of white noise",
    "sketch": "sketch, float16",
    "sampled": "sampled positions, float16",
    "product": "sketch, float16, product form",
    "random": "random channels",
}


def page(record: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    shares = [f"{100 * share:g} %" for share in record["budgets"]]
    lines = [
        "| velocity measured as | numbers per channel | bytes per channel | rank correlation, mean (lowest) "
        "| of 1 - phi | " + " | ".join(f"overlap at {share}" for share in shares) + " |",
        "|---|--:|--:|--:|--:|" + "--:|" * len(shares),
    ]
    for row in record["rows"]:
        size = "" if row["numbers"] is None else row["numbers"]
        correlation = f"{row['correlation']:.3f} ({row['lowest_correlation']:.3f})"
        overlaps = " | ".join(f"{100 * value:.1f} %" for value in row["overlap"])
        lines.append(
            f"| {WORDS[row['kind']]} | {size} | {row['bytes']:,.0f} | {correlation} "
            f"| {row['change_correlation']:.3f} | {overlaps} |"
        )
    found = record["smallest"]
    verdict = (
        "No sketch that was measured does so."
        if found is None
        else f"That is **{found}**, {2 * found} bytes per channel."
    )
    data = ", ".join(dict.fromkeys(run["data"] for run in record["runs"]))
    seeds = len({run["seed"] for run in record["runs"]})
    versions = ", ".join(f"{name} {value}" for name, value in record["machine"]["versions"].items())
    parts = [
        "# Velocity in constant memory",
        f"{record['model']} fine-tuned on {data} at {record['image_size']}x{record['image_size']} for "
        f"{record['epochs']} epochs under exact velocity at 8.8 % of the weights, {seeds} seeds each. Means over all "
        "measurements after the first, which has nothing to compare with.",
        "\n".join(lines),
        "- Rank correlation: Spearman's, of |v| / cost over all channels, with exact velocity on the same probe. "
        "Of 1 - phi: of the change of the responses itself, without the recursion.\n"
        "- Overlap: of the weights that exact velocity selects under a budget, the share that the other selects too.\n"
        "- Bytes per channel: what is kept of the responses to 10 images; the recursion keeps 24 more in all ways.\n"
        "- Another probe: 10 other real images. Selections that differ by less than these are equally good guesses.\n"
        "- Product form: <s, s'> / N in place of 1 - |s - s'|^2 / (2 N), from the same numbers; its error drowns the "
        "small changes.",
        "The default is the fewest numbers per channel whose sketches agree with exact velocity as well as another "
        f"probe does, or by 95 %, in rank and at every budget. {verdict}",
        f"![Agreement with exact velocity against bytes per channel]({record['figure']})",
        f"Commit {record['commit']}, {record['machine']['processor']}, threads {record['machine']['threads']}; "
        f"{versions}; {record['seconds']:.0f} s.\n\n```\n{record['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Rank correlation, and overlap at the paper's smallest budget, against bytes per channel."""
    place = 1 if len(record["budgets"]) > 1 else 0
    share = f"{100 * record['budgets'][place]:g} %"
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(WIDTH_INCHES, 3.8), sharex=True)
        _panel(panels[0], record, [row["correlation"] for row in record["rows"]])
        panels[0].set_title("order of all channels")
        panels[0].set_ylabel("rank correlation (-1 to 1)")
        _panel(panels[1], record, [row["overlap"][place] for row in record["rows"]])
        panels[1].set_title(f"weights selected at {share}")
        panels[1].set_ylabel("overlap (share of the weights)")
        figure.supxlabel("bytes kept of the responses per channel (logarithmic)", fontsize=10)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
        save(figure, path)


def _panel(panel: Any, record: Mapping[str, Any], values: Sequence[float]) -> None:
    """One quantity of all ways to measure, with an arrow at the default."""
    rows = record["rows"]
    for kind, (marker, line, colour, label) in SIZED.items():
        points = [
            (row["bytes"], value) for row, value in zip(rows, values, strict=True) if row["kind"] == kind
        ]
        panel.plot(*zip(*points, strict=True), marker=marker, linestyle=line, color=colour, label=label)
    for row, value in zip(rows, values, strict=True):
        if row["kind"] in LEVELS:
            dashes, grey, words = LEVELS[row["kind"]]
            panel.axhline(value, linestyle=dashes, color=grey, label=words, zorder=1)
        if row["kind"].startswith("exact"):
            name = row["kind"].removeprefix("exact ")
            filled = "black" if name == "float32" else "white"
            panel.plot(
                row["bytes"],
                value,
                "s",
                color="black",
                markerfacecolor=filled,
                linestyle="",
                label=f"exact, {name}",
            )
        if row["kind"] == "sketch" and row["numbers"] == record["smallest"]:
            panel.annotate(
                f"default: {row['numbers']} numbers",
                (row["bytes"], value),
                xytext=(70, -50),
                textcoords="offset points",
                arrowprops={"arrowstyle": "->"},
                fontsize=9,
            )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_ylim(min(0.0, *values), 1.03)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
