"""The page of `plan.py`: tables for a terminal, and the figure of bytes by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparse_bwd.measure.figure_style import STYLE, WIDTH_INCHES, pyplot
from sparse_bwd.measure.plan import RULE, VERSION, Fit, Plan, Row
from sparse_bwd.measure.text_table import aligned

MIB, GIGA = 2**20, 1e9
# From dark to light, so that the order of the kinds can be told in grey as well; hatches tell neighbours apart.
KINDS = {
    "optimizer": ("optimizer state", "#00204d", ""),
    "gradient": ("gradients", "#31446b", "...."),
    "velocity": ("velocity state", "#666970", "////"),
    "saved": ("kept for backward", "#cbba69", ""),
    "transient": ("transient", "#fdea9b", "xxxx"),
}
COLUMNS = ("layer", "trained", "saved", "gradient", "optimizer", "velocity", "transient", "GFLOPs")
TRANSIENT = (
    "Transient is the most in passing while a layer ran, forward or backward: the layers' are never alive together, so "
    "the total shows the largest. Layers that run natively as one block count it for their first convolution."
)
SUM = (
    "A layer is a convolution or linear layer with the norm and activation behind it. The peak is not the sum of the "
    "columns, which are not at their highest at the same time; predicted for this machine."
)
LEAST = 0.005  # of the largest layer: a bar too short to be seen


def render(plan: Plan, width: int | None = None) -> str:
    """The page as plain text."""
    unit = 1 if plan.total.saved + plan.total.transient < 64 * 1024 else MIB
    words, scale = ("B", 1) if unit == 1 else ("MiB", MIB)
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items())
    cells = [_cells(row, scale) for row in [*plan.rows, plan.total]]
    lines = [f"{settings}; sizes in {words}", "", aligned(COLUMNS, cells, width), _whole(plan)]
    return "\n".join([*lines, "", SUM, TRANSIENT, *plan.notes])


def _cells(row: Row, scale: int) -> tuple[str, ...]:
    trained = "whole" if row.trained is None and row.gradient else "-"
    if row.trained is not None:
        trained = f"{row.trained:,} of {row.channels:,}"
    sizes = (row.saved, row.gradient, row.optimizer, row.velocity, row.transient)
    digits = 0 if scale == 1 else 3
    numbers = [f"{size / scale:,.{digits}f}" if size else "-" for size in sizes]
    return row.name, trained, *numbers, f"{row.flops / GIGA:.4f}" if row.flops else "-"


def _whole(plan: Plan) -> str:
    """The lines below the table: what it comes to, against the budget."""
    amounts = [
        ("peak of a step", plan.peak, "highest allocation above what is alive before it"),
        ("needed beyond the network", plan.needed, "peak, optimizer state, compact parameters, policy"),
        ("network", plan.network, "parameters and buffers"),
        ("network and training", plan.sum, f"the batch of {plan.batch / MIB:,.2f} MiB comes on top"),
    ]
    lines = [f"{name:<26}{size / MIB:>10,.2f} MiB   {note}" for name, size, note in amounts]
    used = f"; used: {plan.budget['used']}" if plan.budget["used"] else ""
    return "\n".join([*lines, f"{'budget':<26}{plan.budget['words']}{used}"])


def render_fits(
    found: Sequence[Fit], best: Fit | None, total: int, network: int, width: int | None = None
) -> str:
    """The table of what fits `total` bytes, and the recommendation."""
    columns = ("batch", "axis", "floor", "needed", "with network", "channels", "weights", "share", "GFLOPs")
    cells = [_fit_cells(fit, network, fit is best) for fit in found]
    lines = [
        f"Total {total / MIB:,.2f} MiB = network {network / MIB:,.2f} + {(total - network) / MIB:,.2f} for training; "
        "sizes in MiB.",
        aligned(columns, cells, width),
        "Floor: needed with nothing selected. The input batch comes on top. A larger batch or an axis that is not "
        "listed does not fit.",
        RULE,
    ]
    if best is None or best.needed is None:
        lines.append("Only the classifier fits: no batch leaves room for a channel.")
        return "\n".join(lines)
    lines.append(
        f"Recommended (*): --batch-size {best.batch} --axis {best.axis} --budget {best.budget}B, which needs "
        f"{best.needed / MIB:,.2f} MiB beyond the network, {(network + best.needed) / MIB:,.2f} MiB with it."
    )
    return "\n".join(lines)


def fits_to_dict(found: Sequence[Fit], best: Fit | None, total: int, network: int) -> dict[str, Any]:
    """Plain values for JSON; sizes in bytes."""
    return {
        "version": VERSION,
        "kind": "fit",
        "total": total,
        "network": network,
        "rule": RULE,
        "rows": [asdict(fit) for fit in found],
        "recommended": None if best is None else asdict(best),
    }


def _fit_cells(fit: Fit, network: int, best: bool) -> tuple[str, ...]:
    needed = "-" if fit.needed is None else f"{fit.needed / MIB:,.2f}"
    whole = "-" if fit.needed is None else f"{(network + fit.needed) / MIB:,.2f}"
    trained = (f"{fit.channels:,}", f"{fit.weights:,}", f"{fit.share:.1%}", f"{fit.flops / GIGA:.3f}")
    return f"{'* ' if best else ''}{fit.batch}", fit.axis, f"{fit.floor / MIB:,.2f}", needed, whole, *trained


def draw(plan: Mapping[str, Any], path: Path) -> None:
    """Bytes by layer, from `Plan.to_dict`: what is held, stacked, and beside it, on its own scale, the transient peak.

    Layers that train nothing and hold next to nothing are left out, and counted below the axis.
    """
    plt = pyplot()

    least = LEAST * max((_size(row) for row in plan["rows"]), default=0)
    rows = [row for row in plan["rows"] if row["trained"] or row["gradient"] or _size(row) > least]
    with plt.rc_context(STYLE):
        figure, (held, passing) = plt.subplots(
            1, 2, sharey=True, width_ratios=(3, 2), figsize=(WIDTH_INCHES, 2.2 + 0.19 * len(rows))
        )
        _bars(held, rows, [kind for kind in KINDS if kind != "transient"])
        _bars(passing, rows, ["transient"])
        held.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
        held.set_ylim(len(rows) - 0.4, -0.6)
        held.set_title("held")
        passing.set_title("in passing, one layer at a time")
        passing.tick_params(axis="y", length=0)
        held.set_xlabel("memory of one training step (MiB)")
        passing.set_xlabel("memory (MiB)")
        figure.suptitle(_title(plan, len(plan["rows"]) - len(rows)), fontsize=10, x=0.01, ha="left")
        figure.legend(loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _size(row: Mapping[str, Any]) -> int:
    return sum(row[kind] for kind in KINDS)


def _bars(panel: Any, rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> None:
    left = [0.0] * len(rows)
    for kind in kinds:
        label, colour, hatch = KINDS[kind]
        sizes = [row[kind] / MIB for row in rows]
        panel.barh(
            range(len(rows)),
            sizes,
            left=left,
            height=0.78,
            color=colour,
            hatch=hatch,
            edgecolor="#00000060",
            linewidth=0,
            label=label,
        )
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    panel.set_xlim(0, 1.04 * max(left, default=0) or 1)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _label(row: Mapping[str, Any]) -> str:
    trained = "" if row["trained"] is None else f"  {row['trained']}/{row['channels']}"
    return f"{row['name']}{trained}"


def _title(plan: Mapping[str, Any], omitted: int) -> str:
    words = plan["settings"]
    lines = [
        f"{words['model']}, batch {words['batch']} at {words['image']}, {words['policy']}, axis {words['axis']}; "
        f"budget {plan['budget']['words']}",
        f"needed {plan['needed'] / MIB:,.1f} MiB beyond the network of {plan['network'] / MIB:,.1f} MiB",
    ]
    if omitted:
        lines.append(
            f"{omitted} layers left out, which train nothing and hold less than {LEAST:.1%} of the largest"
        )
    return "\n".join(lines)
