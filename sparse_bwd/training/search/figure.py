"""The figure of a search: gain of the biases, and of every layer at every ratio; readable at 800 pixels and in grey."""

from pathlib import Path
from typing import Any

from sparse_bwd.files import write_atomically
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES

# Marker and shade of the ratios from small to large: told apart by shape where shades are not.
_MARKS = (("o", "#bbbbbb"), ("s", "#888888"), ("^", "#555555"), ("D", "#000000"))


def draw(record: dict[str, Any], path: Path) -> bool:
    """Writes the figure; False, and nothing is written, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, 4.4))
        biases, layers = figure.subplots(1, 2, width_ratios=(1, 3.4))
        _draw_biases(biases, record)
        _draw_layers(layers, record)
        figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return True


def _draw_biases(panel: Any, record: dict[str, Any]) -> None:
    rows = [row for row in record["contributions"] if row["conv"] is None]
    panel.set_title("biases")
    panel.axhline(0, color="black", linewidth=0.8)
    panel.plot([0, *(r["n_bias"] for r in rows)], [0, *(100 * r["gain"] for r in rows)], "o-", color="black")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("of the last k convolutions")
    panel.set_ylabel("gain in points of accuracy")
    panel.grid(color="#dddddd", linewidth=0.6, axis="y")


def _draw_layers(panel: Any, record: dict[str, Any]) -> None:
    rows = [row for row in record["contributions"] if row["conv"] is not None]
    chosen = {pair for row in record["schemes"][:1] for pair in _pairs(row["scheme"])}
    ratios = sorted({row["ratio"] for row in rows})
    shift = 0.8 / max(len(ratios), 1)
    for number, ratio in enumerate(ratios):
        at = (number - (len(ratios) - 1) / 2) * shift
        marker, shade = _MARKS[min(number + max(len(_MARKS) - len(ratios), 0), len(_MARKS) - 1)]
        of_ratio = [row for row in rows if row["ratio"] == ratio]
        x, y = [row["conv"] + at for row in of_ratio], [100 * row["gain"] for row in of_ratio]
        panel.vlines(x, 0, y, color=shade, linewidth=1)
        panel.plot(x, y, marker, color=shade, markersize=4.5, label=f"ratio {ratio:g}")
        ringed = [k for k, row in enumerate(of_ratio) if (row["conv"], ratio) in chosen]
        last = number == len(ratios) - 1
        label = f"chosen for {record['schemes'][0]['budget']}" if chosen and last else None
        rings = ([x[k] for k in ringed] or [None], [y[k] for k in ringed] or [None])
        panel.plot(*rings, "o", markersize=10, markerfacecolor="none", markeredgecolor="black", label=label)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_title("weights, beside the biases")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("convolution, counted from the input")
    panel.grid(color="#dddddd", linewidth=0.6, axis="y")


def _pairs(scheme: dict[str, Any]) -> list[tuple[int, float]]:
    return list(zip(scheme["indices"], scheme["ratios"], strict=True))
