"""Page and figure of `importance.py`; `importance_statistics.py` has what they show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.figures import styles
from benchmarks.accuracy.importance_statistics import IMAGES, Answer, Drops, Line, answers, drops
from benchmarks.accuracy.parts import NONE, PARTS, RANDOM, SCORED
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.significance import MIN_PAIRS, interval
from benchmarks.accuracy.tables import p_value, row
from benchmarks.figures import save
from sparse_bwd.files import write_text
from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot
from sparse_bwd.measure.machine import command_line, machine
from sparse_bwd.training import UserError

CLEAR = 0.05


def answer_table(found: Sequence[Answer]) -> str:
    """One line per order, data set and kind of images."""
    head = ["sorted by", "loss on", "data", "states", "mean rho", "95 % interval", "p", "p (Holm)",
            "highest tenth - random", "95 % interval", "p"]  # fmt: skip
    lines = [row(head), row(["---", "---", "---", *("--:" for _ in head[3:])])]
    for one in found:
        lines.append(
            row(
                [
                    one.order, IMAGES[one.images], one.data or "all", str(len(one.rho)), f"{one.mean:+.2f}",
                    _interval(one.rho, ".2f"), p_value(one.p), p_value(one.corrected),
                    f"{statistics.fmean(one.gains):+.4f}" if one.gains else "", _interval(one.gains, ".4f"),
                    p_value(one.gain_p),
                ]
            )
        )  # fmt: skip
    return "\n".join(lines)


def _interval(values: Sequence[float], form: str) -> str:
    if len(values) < 3:
        return ""
    low, high = interval(values)
    return f"{low:+{form}} to {high:+{form}}"


def part_table(lines: Sequence[Line]) -> str:
    """What the tenths of every order are made of: means over the states."""
    head = ["sorted by", "tenth", "weights", "channels", "layers", "mean layer", "trained in the epoch before",
            "drop, training images", "drop, test images"]  # fmt: skip
    table = [row(head), row(["---", "--:", *("--:" for _ in head[2:])])]
    for order in (NONE, *SCORED, RANDOM):
        for part in range(1, 2 if order == NONE else PARTS + 1):
            members = [line for line in lines if (line["order"], line["part"]) == (order, part)]
            if not members:
                continue

            def mean(key: str, found: Sequence[Line] = members) -> float:
                return statistics.fmean(line[key] for line in found)

            ended = [line for line in members if line["after"] is not None]
            changes = [
                f"{statistics.fmean(line['before'][name] - line['after'][name] for line in ended):+.4f}"
                if ended
                else "diverged"
                for name in IMAGES
            ]
            where = (
                (f"{mean('depth') + 1:.1f}", f"{mean('trained_before'):.0%}") if order != NONE else ("", "")
            )
            table.append(
                row(
                    [
                        order, str(part) if order != NONE else "", f"{mean('trained_weights'):,.0f}",
                        f"{mean('channels'):,.0f}", f"{mean('layers'):.0f}", *where, *changes,
                    ]
                )
            )  # fmt: skip
    return "\n".join(table)


def draw(lines: Sequence[Line], path: Path) -> str:
    """Loss drop against tenth: one column per data set, training images above, test images below."""
    plt = pyplot()
    data = list(dict.fromkeys(line["data"] for line in lines))
    look = styles(SCORED)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(IMAGES), len(data), figsize=(WIDTH_INCHES, 6.4), squeeze=False, sharex=True
        )
        for line_of_panels, (images, words) in zip(panels, IMAGES.items(), strict=True):
            found = drops(lines, images)
            for panel, name in zip(line_of_panels, data, strict=True):
                _draw_panel(panel, [one for one in found if one.key[0] == name], look)
                panel.set_title(f"{name}, {words}")
            line_of_panels[0].set_ylabel("drop of the loss (mean ± SD)")
        for panel in panels[-1]:
            panel.set_xlabel("tenth of the weights (10: highest score)")
            panel.set_xticks(range(1, PARTS + 1))
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        save(figure, path)
    return path.name


def _draw_panel(panel: Any, states: Sequence[Drops], look: Mapping[str, Mapping[str, Any]]) -> None:
    drawn = [one.parts[RANDOM] for one in states if RANDOM in one.parts]
    if drawn:
        middle, spread = float(np.mean(drawn)), float(np.std(drawn, ddof=1))
        panel.axhspan(
            middle - spread, middle + spread, color="#dddddd", label="random tenths, mean ± SD", zorder=0
        )
        panel.axhline(middle, color="#999999", linewidth=1, zorder=0)
    none = [one.none for one in states if one.none is not None]
    if none:
        panel.axhline(
            float(np.mean(none)), color="#000000", linestyle=":", label="no channel: what is always trained"
        )
    for number, order in enumerate(SCORED):
        values = np.array([one.parts[order] for one in states if order in one.parts])
        if not len(values):
            continue
        deviation = values.std(0, ddof=1) if len(values) > 1 else None
        places = np.arange(1, PARTS + 1) + 0.14 * (
            number - 1
        )  # side by side, so that bars do not hide each other
        panel.errorbar(
            places, values.mean(0), yerr=deviation, markersize=4.5, linewidth=1.1, elinewidth=0.7,
            capsize=1.5, label=f"by {order}", **look[order],
        )  # fmt: skip
    panel.grid(color="#eeeeee", linewidth=0.6)
    panel.set_axisbelow(True)


def conclusions(found: Sequence[Answer]) -> list[str]:
    """What the table says, in sentences that depend on it."""
    sentences = []
    for order in SCORED:
        for images, words in IMAGES.items():
            mine = [one for one in found if (one.order, one.images) == (order, images)]
            if not mine:
                continue
            all_data = next((one for one in mine if one.data is None), mine[0])
            sentences.append(_sentence(all_data, words) + _beside(mine))
    return sentences


def levels(lines: Sequence[Line]) -> list[str]:
    """How far the loss falls with each kind of part, per data set and kind of images: means over the states."""
    sentences = []
    for images, words in IMAGES.items():
        found = drops(lines, images)
        for data in dict.fromkeys(one.key[0] for one in found):
            mine = [one for one in found if one.key[0] == data]
            drawn = [statistics.fmean(one.parts[RANDOM]) for one in mine if RANDOM in one.parts]
            sorted_by = [one.parts[SCORED[0]] for one in mine if SCORED[0] in one.parts]
            means = {
                "with what is always trained alone": [one.none for one in mine if one.none is not None],
                "with a random tenth beside it": drawn,
                f"with the lowest tenth by {SCORED[0]}": [parts[0] for parts in sorted_by],
                "with the highest": [parts[-1] for parts in sorted_by],
            }
            said = [f"{_fall(statistics.fmean(values))} {how}" for how, values in means.items() if values]
            sentences.append(f"{data}, {words}: the loss {', '.join(said)}.")
    return sentences


def _fall(drop: float) -> str:
    return f"{'falls' if drop >= 0 else 'rises'} by {abs(drop):.3f}"


def _sentence(one: Answer, words: str) -> str:
    where = f"rank correlation {one.mean:+.2f}, p {p_value(one.corrected)} after correction"
    clear = one.corrected is not None and one.corrected < CLEAR
    if not clear:
        text = f"Sorted by {one.order}, the drop of the loss on {words} does not follow the tenths ({where})"
    else:
        way = "larger" if one.mean > 0 else "smaller"
        text = f"Sorted by {one.order}, tenths of higher score bring a {way} drop of the loss on {words} ({where})"
    if not one.gains:
        return text + "."
    gain = statistics.fmean(one.gains)
    if one.gain_p is None:
        sure = f" (of {len(one.gains)}: too few to test)"
    else:
        sure = "" if one.gain_p < CLEAR else ", which is not beyond chance"
    amount = f"{abs(gain):.4f} {'more' if gain > 0 else 'less'} than a random tenth of its state"
    return f"{text}; the highest tenth brings {amount}{sure}."


def _beside(mine: Sequence[Answer]) -> str:
    single = [one for one in mine if one.data is not None]
    if len(single) < 2:
        return ""
    return " Alone: " + ", ".join(f"{one.data} {one.mean:+.2f}" for one in single) + "."


def report(plan: Plan, lines: Sequence[Line], stem: Path) -> str:
    """Writes STEM.md and STEM.png; returns the page. UserError if nothing is finished."""
    if not lines:
        raise UserError("No part has been measured yet; give it more --minutes.")
    found = answers(lines)
    picture = draw(lines, stem.with_suffix(".png"))
    parts = [
        "# Is velocity importance?",
        _about(plan, lines),
        "\n".join(f"- {sentence}" for sentence in (*conclusions(found), *levels(lines))),
        f"![Drop of the loss against the tenth]({picture})",
        answer_table(found),
        _reading(lines[0]),
        "## The tenths",
        part_table(lines),
        _origin(lines),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(stem.with_suffix(".md"), text)
    return text


def _about(plan: Plan, lines: Sequence[Line]) -> str:
    first = lines[0]
    states = {(line["data"], line["model"], line["seed"]) for line in lines}
    rates = ", ".join(f"{d} {lr:g}" for d, lr in dict.fromkeys((line["data"], line["lr"]) for line in lines))
    return (
        f"{plan.title}. Runs of '{first['method']}' at the budget {first['budget']}, norms in mode "
        f"'{first['batch_norm']}', up to the end of epoch {first['after_epochs']}: {len(states)} states of "
        f"{len({line['data'] for line in lines})} data sets. In each, all channels are sorted by a score and cut into "
        f"{PARTS} parts of equal weights; every part is trained for the run's next epoch from the very same state: "
        f"same batches, augmentations and learning rates ({rates} at their highest). What is always trained "
        "(classifier, norm shifts) is trained beside every part, and alone as a control; random tenths of the same "
        "weights are the other."
    )


def _reading(first: Line) -> str:
    return (
        "Drop: mean cross entropy before less after, in eval mode without augmentation, on at most "
        f"{first['images']} images of each set, the same for all parts. Test images choose nothing here. rho: "
        "Spearman's, of tenth and drop within a state; p: 9,999 random orders of the drops within the states, Holm "
        "over all rows; interval: bootstrap over at least three states. Highest tenth less the ten random ones of its "
        f"state: p by sign flips, from {MIN_PAIRS} states on. Sorted by a score per weight, channels of few weights "
        "tend to come into the highest tenths; gradient: its norm on the run's probe with labels, in the same state. A "
        "score that is larger for channels trained in the epoch before is partly a record of that choice: the table "
        "below has their share. Tenths differ in their layers, so that a rank correlation speaks of channels where "
        "they are, not of channels of one layer."
    )


def _origin(lines: Sequence[Line]) -> str:
    where = machine()
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    hours = sum(line["seconds"] for line in lines) / 3600
    return (
        f"{len(lines)} epochs, {hours:.1f} h, at commit {commits}, on {where['processor']}, "
        f"{lines[0]['threads']} thread(s), torch {where['versions']['torch']}:\n\n"
        f"```\n{command_line('benchmarks.accuracy.importance')}\n```"
    )
