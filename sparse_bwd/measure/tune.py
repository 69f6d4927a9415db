"""Tables of tiles from measurements: which configuration is fastest for each class of shapes on a GPU.

A class is an entry of the shipped default table: the calls that it serves. Its candidates are its own tile and, around
it, each constant and the warps halved and doubled, and one stage more and less. The best is the one with the smallest
geometric mean of times over the calls of its class; candidates far behind on a call do not see the next. A class that
plain PyTorch serves faster is left to it, and native kernels that are faster over all calls of an operator are asked
before Triton's.

What measures is handed in (`Timer`; `gpu_timer.py` has that of a GPU), so that all this runs without a GPU too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_bwd.measure.kernels import Call
from sparse_bwd.measure.tiles import Entry, config_of, entry_numbers, entry_of, includes, instead
from sparse_bwd.ops.tuning import Config

WARPS, STAGES = (1, 2, 4, 8), (1, 2, 3, 4, 5)
LARGEST = 4096  # constant of a tile
CALLS = 3  # of a class at the most, evenly spread over those that there are
BEHIND = 1.2  # times the time of the best: a candidate that takes longer is given up
LEAD = 0.97  # of the time of what is there now: a smaller difference is chance

# Time in ms of a call by an implementation, in a configuration of Triton's kernel (None: that of the table). None where
# the implementation does not serve the call, does not compile or computes something else.
Timer = Callable[[Call, str, Config | None], float | None]
Progress = Callable[[int, int, str], None]


@dataclass
class Class:
    """An entry of a table, the calls that it serves, and what was found: the best configuration and all times."""

    table: str
    entry: Entry
    calls: list[Call] = field(default_factory=list)
    best: Config | None = None
    times: dict[Call, dict[str, float]] = field(default_factory=dict)  # in ms, by implementation


def shape_classes(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with a tile each: one that leaves its calls to others is cut by those after it, which have tiles."""
    found: list[Entry] = []
    for number, entry in enumerate(entries):
        parts = [entry] if "tile" in entry else [_both(entry, later) for later in entries[number + 1 :]]
        for part in parts:
            if "tile" in part and not any(includes(other["most"], part.get("most", {})) for other in found):
                found.append({**part, "most": part.get("most", {})})
    return found


def _both(leaving: Entry, later: Entry) -> Entry:
    """The later entry with the bounds of both."""
    most, others = dict(later.get("most", {})), leaving.get("most", {})
    most |= {name: min(bound, most.get(name, bound)) for name, bound in others.items()}
    return {**later, "most": most}


def classes_of(tables: Mapping[str, Sequence[Entry]], calls: Iterable[Call]) -> list[Class]:
    """The classes of all tables with the calls that they serve."""
    entries = {table: shape_classes(found) for table, found in tables.items()}
    made = {table: [Class(table, entry) for entry in found] for table, found in entries.items()}
    for call in calls:
        for table, number in (entry_numbers(call, entries) or {}).items():
            made[table][number].calls.append(call)
    for each in (each for found in made.values() for each in found):
        each.calls = each.calls[:: max(1, math.ceil(len(each.calls) / CALLS))]
    return [each for found in made.values() for each in found]


def candidates(start: Config) -> list[Config]:
    """A configuration and those that are one step away from it."""
    found = [start]
    for name, value in start.tile.items():
        for changed in (value // 2, value * 2):
            if 1 <= changed <= LARGEST:
                found.append(start._replace(tile={**start.tile, name: changed}))
    found += [start._replace(warps=w) for w in (start.warps // 2, start.warps * 2) if w in WARPS]
    found += [start._replace(stages=s) for s in (start.stages - 1, start.stages + 1) if s in STAGES]
    return found


def race(each: Class, timer: Timer) -> None:
    """Find the best configuration of a class that has calls; its own where none is clearly faster."""
    own = config_of(each.entry)
    logs: list[tuple[float, Config]] = [(0.0, config) for config in candidates(own)]
    for call in each.calls:
        taken = []
        for total, config in logs:
            with instead(each.table, [entry_of(config)]):
                ms = timer(call, "triton", config)
            if ms is not None:
                taken.append((total + math.log(ms), config))
        if not taken:
            return  # nothing runs: the shipped entry stays
        least = min(total for total, _ in taken)
        count = each.calls.index(call) + 1
        logs = [(total, config) for total, config in taken if total - least < count * math.log(BEHIND)]
    best, config = min(logs, key=lambda pair: pair[0])
    mine = next((total for total, other in logs if other == own), math.inf)
    each.best = config if best < mine + len(each.calls) * math.log(LEAD) else own
    for call in each.calls:
        with instead(each.table, [entry_of(each.best)]):
            found = {name: timer(call, name, None) for name in ("triton", "native", "plain")}
        each.times[call] = {name: ms for name, ms in found.items() if ms is not None}


def ratio(times: Iterable[Mapping[str, float]], name: str, other: str) -> float | None:
    """Geometric mean of the time of one implementation over that of another; None where no call has both."""
    logs = [math.log(row[name] / row[other]) for row in times if name in row and other in row]
    return math.exp(sum(logs) / len(logs)) if logs else None


def entries_of(each: Class, leaves: bool) -> list[Entry]:
    """What the new table says of a class: its tile, after leaving its calls to others where PyTorch is faster.

    The tile is there in both cases, for whoever must have Triton's kernel. A class that was not measured stays as the
    shipped table has it; `leaves`: whether that leaves it.
    """
    most = {"most": each.entry["most"]} if each.entry["most"] else {}
    entry = {**most, **entry_of(each.best or config_of(each.entry))}
    slower = ratio(each.times.values(), "triton", "plain")
    leave = leaves if slower is None else slower > 1 / LEAD
    return [dict(most), entry] if leave else [entry]


def order_of(operator: str, shipped: Sequence[str], classes: Iterable[Class]) -> list[str]:
    """Which implementations of an operator are asked, the best first."""
    times = [row for each in classes for call, row in each.times.items() if call.operator == operator]
    against_plain = ratio(times, "triton", "plain")
    if against_plain is None:
        return list(shipped)
    native = ratio(times, "native", "triton")
    first = "native" if native is not None and native < LEAD else "triton"
    others = [name for name in shipped if name not in (first, "plain")]
    if first == "native" and "triton" not in others:
        others.append("triton")
    return [first, *others, "plain"]


def tune(
    shipped: Mapping[str, Any],
    calls: Iterable[Call],
    timer: Timer,
    progress: Progress = lambda done, total, what: None,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The "order" and "configs" of an architecture, from the default ones and measurements.

    Args:
        shipped: {"order": ..., "configs": ...} of the default architecture.
        calls: what is measured.
        timer: measures a call.
        progress: is told how many classes are done, how many there are, and which is next.
        only: tables to measure; the others stay as they are. None = all.
    """
    tables = {name: found for name, found in shipped["configs"].items() if only is None or name in only}
    classes = classes_of(tables, calls)
    todo = [each for each in classes if each.calls]
    for number, each in enumerate(todo):
        progress(number, len(todo), each.table)
        race(each, timer)
    progress(len(todo), len(todo), "done")
    configs = dict(shipped["configs"])
    for name, entries in tables.items():
        mine = (each for each in classes if each.table == name)
        configs[name] = [entry for each in mine for entry in entries_of(each, _left(each.entry, entries))]
    order = {name: order_of(name, found, classes) for name, found in shipped["order"].items()}
    return {"order": order, "configs": configs}


def _left(entry: Entry, shipped: Sequence[Entry]) -> bool:
    """Whether the shipped table leaves the calls of a class to others."""
    first = next(each for each in shipped if includes(each.get("most", {}), entry["most"]))
    return "tile" not in first
