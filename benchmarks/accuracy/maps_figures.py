"""Figures of `maps.py`, readable at 800 pixels and in grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.figures import styles
from benchmarks.figures import save
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot

Summary = Mapping[str, Any]
_IN_A_ROW = 4


def _save(figure: Any, path: Path) -> str:
    save(figure, path)
    return path.name


def _layer_ticks(panel: Any, names: Sequence[str], every: int) -> None:
    places = range(0, len(names), every)
    panel.set_yticks(places, [names[place] for place in places], fontsize=7)


def draw_maps(one: Summary, path: Path) -> str:
    """Share of the channels that is trained: layers downwards, epochs to the right, a panel per method."""
    plt = pyplot()
    from matplotlib.colors import PowerNorm

    methods, layers = one["methods"], one["layers"]
    rows = math.ceil(len(methods) / _IN_A_ROW)
    columns = math.ceil(len(methods) / rows)
    norm = PowerNorm(0.5, 0, 1)  # most shares are small
    with plt.rc_context({**STYLE, "axes.titlesize": 9}):
        size = (WIDTH_INCHES, 0.6 + 4.6 * rows)
        figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
        picture = None
        for panel in panels.flat[len(methods) :]:
            panel.set_visible(False)
        for panel, (name, method) in zip(panels.flat, methods.items(), strict=False):
            shares = np.array(method["shares"])
            picture = panel.imshow(
                shares, aspect="auto", cmap="Greys", norm=norm, interpolation="nearest",
                extent=(0.5, shares.shape[1] + 0.5, len(layers) - 0.5, -0.5),
            )  # fmt: skip
            seeds = len(method["seeds"])
            panel.set_title(f"{name}\n{seeds} seed{'s' if seeds != 1 else ''}")
            panel.set_xticks(range(1, shares.shape[1] + 1))
            panel.set_xlabel("epoch")
            panel.spines[["top", "right"]].set_visible(True)
        for line in panels:
            _layer_ticks(line[0], layers, max(1, len(layers) // 17))
            line[0].set_ylabel("layer, first at the top")
        ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]
        bar = figure.colorbar(picture, ax=panels, location="bottom", shrink=0.6, aspect=40, ticks=ticks)
        bar.ax.set_xticklabels([f"{tick:.0%}" for tick in ticks])
        bar.set_label(f"share of the layer's channels that is trained ({one['data']})")
        return _save(figure, path)


def draw_layers(networks: Sequence[Summary], path: Path) -> str:
    """Cumulative share of the trained weights along the layers, with that of all weights."""
    plt = pyplot()
    look = styles(list(dict.fromkeys(name for one in networks for name in one["methods"])))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(networks), figsize=(WIDTH_INCHES, 4.2), squeeze=False, sharey=True
        )
        for panel, one in zip(panels[0], networks, strict=True):
            places = np.arange(1, len(one["layers"]) + 1)
            everything = np.cumsum(one["layer_weights"]) / sum(one["layer_weights"])
            panel.fill_between(places, 100 * everything, color="#dddddd", label="all weights of the network")
            for name, method in one["methods"].items():
                share = 100 * np.cumsum(method["trained"]) / max(1.0, sum(method["trained"]))
                panel.plot(places, share, markersize=4, markevery=6, linewidth=1.3, label=name, **look[name])
            panel.set_title(one["data"])
            panel.set_xlabel("layer, in the order of the network")
            panel.grid(color="#eeeeee", linewidth=0.6)
            panel.set_axisbelow(True)
        panels[0][0].set_ylabel("trained weights up to this layer (%)")
        handles: dict[str, Any] = {}
        for panel in panels[0]:
            handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )
        return _save(figure, path)


def draw_overlaps(networks: Sequence[Summary], path: Path) -> str:
    """Weights in common of every kind of pair: mean and range, beside chance."""
    plt = pyplot()
    kinds = list(dict.fromkeys(kind["kind"] for one in networks for kind in one["overlap"]))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(networks), figsize=(WIDTH_INCHES, 1.6 + 0.3 * len(kinds)), squeeze=False, sharey=True
        )
        for panel, one in zip(panels[0], networks, strict=True):
            for kind in one["overlap"]:
                place = kinds.index(kind["kind"])
                share = 100 * kind["share"]
                spread = [[share - 100 * kind["low"]], [100 * kind["high"] - share]]
                panel.errorbar(
                    share, place, xerr=spread, fmt="o", color="#000000", markersize=5, elinewidth=0.8, capsize=2,
                    label="in common: mean and range of the pairs",
                )  # fmt: skip
                panel.plot(
                    100 * kind["chance"], place, "|", color="#000000", markersize=13, label="by chance"
                )
                panel.plot(
                    100 * kind["by_layers"], place, "D", markerfacecolor="none", color="#555555", markersize=6,
                    label="by the layers alone",
                )  # fmt: skip
            panel.set_title(one["data"])
            panel.set_xlabel("weights in common (%)")
            panel.set_xlim(-3, 103)
            panel.grid(color="#eeeeee", linewidth=0.6)
            panel.set_axisbelow(True)
        panels[0][0].set_yticks(range(len(kinds)), kinds, fontsize=8)
        panels[0][0].invert_yaxis()
        handles = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9
        )
        return _save(figure, path)


def draw_classes(one: Summary, path: Path) -> str:
    """Heat map of channels x classes, and the selectivity of each channel beside the mean of its layer."""
    plt = pyplot()
    rows = one["classes"]["shown"]
    means = np.array([row["means"] for row in rows])
    limit = float(np.abs(means).max()) or 1.0
    places = np.arange(len(rows))
    with plt.rc_context(STYLE):
        figure, (heat, side) = plt.subplots(
            1, 2, figsize=(WIDTH_INCHES, 1.9 + 0.19 * len(rows)), sharey=True, width_ratios=(3, 1)
        )
        picture = heat.imshow(
            means, aspect="auto", cmap="Greys", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        heat.set_xticks(range(means.shape[1]), one["classes"]["names"], rotation=40, ha="right", fontsize=8)
        heat.set_yticks(places, [f"{row['layer']} #{row['channel']}" for row in rows], fontsize=7)
        heat.set_title(f"{one['data']}: mean response per class")
        heat.spines[["top", "right"]].set_visible(True)
        bar = figure.colorbar(picture, ax=heat, location="bottom", shrink=0.7, aspect=35)
        bar.set_label("standard deviations from the channel's mean")
        side.barh(places, [100 * row["selectivity"] for row in rows], color="#888888", label="channel")
        side.plot(
            [100 * row["beside"] for row in rows], places, "k|", markersize=9, label="mean of its layer"
        )
        side.set_title("selectivity")
        side.set_xlabel("variance explained\nby the classes (%)")
        figure.legend(loc="outside lower right", frameon=False, fontsize=8)
        return _save(figure, path)
