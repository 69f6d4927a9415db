"""The table: what each layer takes of a step, and how far that is from the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from sparse_bwd.measure.profile.least import works
from sparse_bwd.measure.profile.ranges import BACKWARD, FORWARD, Range
from sparse_bwd.measure.profile.roofline import Ceilings
from sparse_bwd.measure.shapes import Call
from sparse_bwd.measure.text_table import aligned

MIB, GIGA = 2**20, 1e9
LOSS, UPDATE = "(loss, gradients)", "(optimizer)"
COLUMNS = ("layer", "forward ms", "backward ms", "share", "MiB", "GFLOP", "roofline")
CAPTION = (
    "share: of the step. MiB and GFLOP: what forward and backward must move and compute at least "
    "(sparse_bwd/measure/profile/least.py). roofline: the sum over layers and directions of max(bytes / B, "
    "operations / P), divided by the measured time; above 100 % data stayed in a cache."
)
WORDS = (
    f'Several layers in a row run as one. "itself": what a module does beside its layers, for one copying trained '
    f"slices into the weights. {LOSS}: the loss, its gradient, and what autograd does between layers."
)


@dataclass(frozen=True)
class Row:
    """Layers that run as one, what a module does beside its layers, or a part that is no layer's.

    forward, backward, update in ms (update: of the optimizer); bytes and operations of forward and backward together;
    least in ms, 0 where nothing is known.
    """

    label: str
    layers: tuple[str, ...]
    forward: float
    backward: float
    update: float
    bytes: int
    operations: int
    least: float

    @property
    def ms(self) -> float:
        """Of the step."""
        return self.forward + self.backward + self.update

    @property
    def roofline(self) -> float | None:
        """Share of the roofline; None where nothing is known or nothing was measured."""
        taken = self.forward + self.backward
        return self.least / taken if self.least and taken > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "layers": list(self.layers), "roofline": self.roofline}


def make_rows(times: Mapping[Range, float], calls: Sequence[Call], ceilings: Ceilings) -> list[Row]:
    """All rows, the most expensive first."""
    by_name: dict[str, list[Call]] = {}
    for call in calls:
        by_name.setdefault(call.name or f"({type(call.module).__name__})", []).append(call)
    rows = []
    for layers, inside in dict.fromkeys((what.layers, what.inside) for what in times):
        forward, backward, update = (
            times.get(Range(phase, layers, inside), 0.0) for phase in (FORWARD, BACKWARD, "optimizer")
        )
        if not layers:
            rows.append(Row(LOSS, (), forward, backward, 0.0, 0, 0, 0.0))
            rows.append(Row(UPDATE, (), 0.0, 0.0, update, 0, 0, 0.0))
            continue
        found = [] if inside else [work for both in works(layers, by_name) for work in both]
        moved, operations = sum(work.bytes for work in found), sum(work.operations for work in found)
        label = label_of(layers, inside)
        rows.append(Row(label, layers, forward, backward, 0.0, moved, operations, ceilings.least_ms(found)))
    return sorted(rows, key=lambda row: -row.ms)


def label_of(layers: Sequence[str], inside: bool = False) -> str:
    """A short name: the layers' names without what they share, the first and the last for many."""
    if len(layers) == 1:
        return f"{layers[0]}, itself" if inside else layers[0]
    columns = zip(*(name.split(".") for name in layers), strict=False)
    parts = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, columns)]
    first, last = (".".join(name.split(".")[len(parts) :]) for name in (layers[0], layers[-1]))
    shared = f"{'.'.join(parts)}: " if parts else ""
    return f"{shared}{first} to {last} ({len(layers)} layers)"


def total_of(rows: Sequence[Row], label: str = "total") -> Row:
    """The sum of rows."""
    return Row(
        label,
        (),
        sum(row.forward for row in rows),
        sum(row.backward for row in rows),
        sum(row.update for row in rows),
        sum(row.bytes for row in rows),
        sum(row.operations for row in rows),
        sum(row.least for row in rows),
    )


def shown(rows: Sequence[Row], top: int) -> list[tuple[str, ...]]:
    """The cells of the `top` most expensive rows, the others together, and the total."""
    whole = total_of(rows)
    found = list(rows[:top])
    if len(rows) > top:
        found.append(total_of(rows[top:], f"{len(rows) - top} others"))
    return [_cells(row, whole.ms) for row in [*found, whole]]


def _cells(row: Row, whole: float) -> tuple[str, ...]:
    times = [f"{ms:.3f}" if ms else "-" for ms in (row.forward, row.backward)]
    moved = f"{row.bytes / MIB:,.2f}" if row.bytes else "-"
    operations = f"{row.operations / GIGA:.4f}" if row.operations else "-"
    # What is no layer has no share: its time would count, and its work would not.
    share = "-" if row.roofline is None else f"{row.roofline:.0%}"
    return row.label, *times, f"{row.ms / whole:.1%}", moved, operations, share


def as_text(rows: Sequence[Row], top: int) -> str:
    """The table for a terminal."""
    return aligned(COLUMNS, shown(rows, top))


def as_markdown(rows: Sequence[Row], top: int) -> str:
    """The table for a page."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in shown(rows, top))])
