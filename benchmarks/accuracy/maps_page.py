"""STEM.json and STEM.md of `maps.py`: the summary of what was found, and the page with its figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import maps_figures, responding
from benchmarks.accuracy.chosen import FIRST_CHOSEN, Chosen, Share, epoch_pairs, method_pairs, seed_pairs
from benchmarks.accuracy.maps import GRADIENT, Found, masks
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.tables import p_value, row
from sparse_bwd.files import write_text
from sparse_bwd.measure.machine import command_line, commit, machine

Summary = Mapping[str, Any]
CLEAR = 0.05
NEAR = 1.2  # within this factor of chance, what is in common is called chance


def summarise(found: Sequence[Found], method: str) -> dict[str, Any]:
    """All numbers of the page and its figures, JSON-friendly."""
    return {
        "version": 1, "method": method, "machine": machine(), "commit": commit(Path(__file__).parent),
        "command": command_line("benchmarks.accuracy.maps"), "networks": [_summary(one, method) for one in found],
    }  # fmt: skip


def _summary(one: Found, method: str) -> dict[str, Any]:
    return {
        "data": one.data, "model": one.model, "budget": next(iter(one.methods.values()))[0].run.budget,
        "layers": list(one.weights.layers), "depthwise": one.weights.depthwise,
        "layer_weights": one.weights.sizes.tolist(),
        "methods": {name: _method(one, runs) for name, runs in one.methods.items()},
        "overlap": _overlaps(one, method), "states": _states(one), "classes": _classes(one, method),
    }  # fmt: skip


def _method(one: Found, runs: Sequence[Chosen]) -> dict[str, Any]:
    """Means over the seeds: share of channels [layers][epochs]; without epoch 1 trained weights of each layer."""
    shares = torch.stack([one.weights.shares(run) for run in runs]).mean(0)
    trained = torch.stack(
        [one.weights.trained(run.axis, epoch).double() for run in runs for epoch in run.epochs[FIRST_CHOSEN:]]
    ).mean(0)
    return {
        "axis": runs[0].axis, "seeds": [run.run.seed for run in runs], "shares": shares.tolist(),
        "trained": trained.tolist(),
    }  # fmt: skip


def _overlaps(one: Found, method: str) -> list[dict[str, Any]]:
    kinds: list[tuple[str, Iterable[Share]]] = []
    for name, runs in one.methods.items():
        kinds.append((f"{name}: seeds, same epoch", seed_pairs(one.weights, runs)))
    for name, runs in one.methods.items():
        kinds.append((f"{name}: successive epochs", epoch_pairs(one.weights, runs)))
    mine = one.methods.get(method, [])
    for name, runs in one.methods.items():
        if mine and name != method:
            kinds.append((f"{method} and {name}", method_pairs(one.weights, mine, runs)))
    kinds.append((f"{method} and {GRADIENT}, same state", _state_pairs(one)))
    return [_kind(name, shares) for name, pairs in kinds if (shares := list(pairs))]


def _state_pairs(one: Found) -> Iterable[Share]:
    for line in one.states:
        pair = ((line["axis"], masks(line, which)) for which in ("velocity", "gradient"))
        yield one.weights.compare(*pair)


def _kind(name: str, shares: Sequence[Share]) -> dict[str, Any]:
    values = [share.share for share in shares]
    return {
        "kind": name, "pairs": len(values), "share": statistics.fmean(values), "low": min(values),
        "high": max(values), "chance": statistics.fmean(share.chance for share in shares),
        "by_layers": statistics.fmean(share.by_layers for share in shares),
    }  # fmt: skip


def _states(one: Found) -> dict[str, Any] | None:
    if not one.states:
        return None
    return {
        "count": len(one.states), "as_logged": sum(line["as_logged"] for line in one.states),
        "rank_correlation": statistics.fmean(line["rank_correlation"] for line in one.states),
    }  # fmt: skip


def _classes(one: Found, method: str) -> dict[str, Any] | None:
    runs = [run for run in one.methods.get(method, []) if run.axis == "out"]
    if one.responses is None or not runs or len(runs[0].epochs) < 2:
        return None
    times = responding.times_selected(runs)
    chosen = responding.most_often(times)
    most = sum(len(run.epochs) - 1 for run in runs)
    rows = responding.shown(chosen)
    eta2, means = one.responses.selectivity, one.responses.means
    return {
        "names": one.classes, "test": vars(responding.compare(times, chosen, eta2, most)),
        "shown": [
            {"layer": name, "channel": c, "times": int(times[name][c]), "selectivity": float(eta2[name][c]),
             "beside": float(eta2[name].mean()), "means": means[name][:, c].tolist()}
            for name, c in rows
        ],
    }  # fmt: skip


def write_page(plan: Plan, summary: Summary, stem: Path) -> str:
    """Draws the figures and writes STEM.md; returns it."""
    parts = ["# What the policies select", _about(plan, summary)]
    for one in summary["networks"]:
        name = f"{stem.name}-{one['data']}"
        picture = maps_figures.draw_maps(one, stem.with_name(f"{name}-selected.png"))
        parts += [f"## {one['data']}: layers over the epochs", _where(one)]
        parts += [f"![Share of the channels that is trained, {one['data']}]({picture})"]
    where = maps_figures.draw_layers(summary["networks"], stem.with_name(f"{stem.name}-layers.png"))
    parts += ["## Where the trained weights are", f"![Trained weights along the layers]({where})"]
    overlap = maps_figures.draw_overlaps(summary["networks"], stem.with_name(f"{stem.name}-overlap.png"))
    parts += ["## What selections have in common", _common(summary)]
    parts += [f"![Overlap of selections]({overlap})", overlap_table(summary["networks"]), _reading()]
    for one in summary["networks"]:
        if one["classes"] is None:
            continue
        picture = maps_figures.draw_classes(one, stem.with_name(f"{stem.name}-{one['data']}-classes.png"))
        parts += [f"## {one['data']}: classes that the most selected channels respond to"]
        parts += [_selectivity(one, summary["method"]), f"![Responses to classes, {one['data']}]({picture})"]
    parts.append(_origin(summary))
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(stem.with_suffix(".md"), text)
    return text


def _about(plan: Plan, summary: Summary) -> str:
    networks = summary["networks"]
    runs = sum(len(method["seeds"]) for one in networks for method in one["methods"].values())
    counts = "; ".join(
        f"{one['data']}: "
        + ", ".join(f"{name} ({len(method['seeds'])})" for name, method in one["methods"].items())
        for one in networks
    )
    return (
        f"{plan.title}: {runs} finished runs at the budget {networks[0]['budget']} (seeds in brackets: {counts}). In "
        "epoch 1 velocity is not known yet and draws channels at random."
    )


def _where(one: Summary) -> str:
    """Which layers hold half of the trained weights, and of which kind the trained channels are."""
    sentences = []
    for name, method in one["methods"].items():
        trained = method["trained"]
        opened = sum(value > 0 for value in trained)
        sentences.append(
            f"- {name} (axis {method['axis']}): {half(trained)} of {len(trained)} layers hold half of its trained "
            f"weights; {opened} have a trained channel. Most are in {_largest(one['layers'], trained)}."
            + _kinds(one["depthwise"], method["shares"])
        )
    return "\n".join(sentences)


def _kinds(depthwise: Sequence[bool], shares: Sequence[Sequence[float]]) -> str:
    """Mean share of the channels of depthwise layers and of the others; nothing where one kind is missing."""
    if len(set(depthwise)) < 2:
        return ""
    means = [
        statistics.fmean(
            statistics.fmean(share[FIRST_CHOSEN:])
            for share, is_depthwise in zip(shares, depthwise, strict=True)
            if is_depthwise == kind
        )
        for kind in (True, False)
    ]
    return f" It trains {means[0]:.0%} of the channels of depthwise layers and {means[1]:.0%} of those of the others."


def half(values: Sequence[float]) -> int:
    """The fewest that make up half of the sum."""
    total, found = 0.0, 0
    for value in sorted(values, reverse=True):
        if total >= sum(values) / 2:
            break
        total, found = total + value, found + 1
    return found


def _largest(names: Sequence[str], values: Sequence[float], count: int = 3) -> str:
    order = sorted(range(len(values)), key=lambda i: -values[i])[:count]
    return ", ".join(f"{names[i]} ({values[i] / sum(values):.0%})" for i in order)


def _common(summary: Summary) -> str:
    """One sentence per kind of pair that has to do with the method."""
    lines = []
    for one in summary["networks"]:
        for kind in one["overlap"]:
            if kind["kind"].startswith(summary["method"]):
                lines.append(f"- {one['data']}, {kind['kind']}: {_overlap_words(kind)}")
        if one["states"]:
            states = one["states"]
            lines.append(
                f"- {one['data']}: |v| and the gradient's norm per weight have a rank correlation of "
                f"{states['rank_correlation']:+.2f} over all channels, mean of {states['count']} states; in "
                f"{states['as_logged']} of them the run made again trained the very channels of the logged one."
            )
    return "\n".join(lines)


def _overlap_words(kind: Mapping[str, Any]) -> str:
    share, chance, layers = kind["share"], kind["chance"], kind["by_layers"]
    text = f"{share:.1%} in common, {share / chance:.1f} times chance ({chance:.1%})"
    if share < NEAR * chance:
        about = "less than chance" if share < chance / NEAR else "about chance"
        return f"{text}: {about}; the layers alone would give {layers:.1%}."
    explained = (layers - chance) / (share - chance)
    if explained >= 1:
        return f"{text}; the layers alone would give {layers:.1%}: which channels of a layer adds nothing."
    return f"{text}; the layers alone would give {layers:.1%}, {max(0.0, explained):.0%} of what is beyond chance."


def overlap_table(networks: Sequence[Summary]) -> str:
    """All kinds of pairs."""
    head = ["data", "selections", "pairs", "in common", "least", "most", "chance", "by layers alone"]
    lines = [row(head), row(["---", "---", *("--:" for _ in head[2:])])]
    for one in networks:
        for kind in one["overlap"]:
            shares = [f"{kind[key]:.1%}" for key in ("share", "low", "high", "chance", "by_layers")]
            lines.append(row([one["data"], kind["kind"], str(kind["pairs"]), *shares]))
    return "\n".join(lines)


def _reading() -> str:
    return (
        "In common: weights that both selections train, over the mean of what they train; without epoch 1. Chance: "
        "channels drawn anywhere in the network under the same budget. By layers alone: channels drawn anew within the "
        "layers, as many as each selection has there. A selection of inputs and one of outputs share the weights where "
        "they cross, which depends on the layers alone but for depthwise ones. Gradient norm: of the loss on the run's "
        "probe with labels, per weight, in the states of the runs themselves."
    )


def _selectivity(one: Summary, method: str) -> str:
    test = one["classes"]["test"]
    more = test["selected"] - test["random"]
    if test["p"] < CLEAR:
        verdict = (
            f"They tell classes apart {'better' if more > 0 else 'worse'} than channels of the same layers do"
        )
    else:
        verdict = "They tell classes apart no better and no worse than channels of the same layers do"
    return (
        f"The {test['channels']:,} channels of {test['layers']} layers that {method} selected in "
        f"{_times(test)} choices: classes explain {test['selected']:.1%} of the variance of their "
        f"responses over test images, beside {test['random']:.1%} for random channels of the same layers (p "
        f"{p_value(test['p'])}, permutation within layers). {verdict}. The figure shows "
        f"{len(one['classes']['shown'])} of them, spread evenly over the network: mean standardised response to each "
        "class, mean over the trained networks."
    )


def _times(test: Mapping[str, Any]) -> str:
    return (
        f"all {test['most']}"
        if test["times"] == test["most"]
        else f"at least {test['times']} of {test['most']}"
    )


def _origin(summary: Summary) -> str:
    where = summary["machine"]
    return (
        f"Made at commit {summary['commit']} on {where['processor']}, torch {where['versions']['torch']}:\n\n"
        f"```\n{summary['command']}\n```"
    )
