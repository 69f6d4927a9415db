"""Which configurations of `ops/tuning.json` a call of an operator can meet, and how to give it another one."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from sparse_bwd.measure.kernels import Call, precision
from sparse_bwd.ops import backend, tuning
from sparse_bwd.ops.triton.launch import Launch, recorded
from sparse_bwd.ops.tuning import Config

Entry = dict[str, Any]  # {"most": {size: bound}, "tile": {...}, "warps": n, "stages": n}


def operators() -> list[str]:
    """The operators that have Triton kernels."""
    return backend.in_triton()


def modules() -> Iterator[ModuleType]:
    """The modules of `ops/triton`."""
    package = import_module("sparse_bwd.ops.triton")
    for found in pkgutil.iter_modules(package.__path__):
        yield import_module(f"{package.__name__}.{found.name}")


def in_triton(operator: str) -> Callable[..., Any]:
    """The function of `ops/triton` that serves an operator."""
    for module in modules():
        function: Callable[..., Any] | None = getattr(module, operator, None)
        if function is not None and getattr(function, "__module__", None) == module.__name__:
            return function
    raise KeyError(f"No module of sparse_bwd.ops.triton has a function {operator}.")


def unused(launched: set[str]) -> list[str]:
    """The kernels of `ops/triton` that are not among those launched, and that no other kernel calls."""
    sources = {
        name: value.src
        for module in modules()
        for name, value in vars(module).items()
        if hasattr(value, "src")
    }
    called = {
        name
        for name in sources
        for other, source in sources.items()
        if name != other and re.search(rf"\b{name}\(", source)
    }
    return sorted(set(sources) - launched - called)


def tables(architecture: str) -> list[str]:
    """The names of all tables of configurations."""
    return sorted(
        {
            name
            for table in tuning.tables()
            for key in (architecture, tuning.DEFAULT)
            for name in table.get(key, {}).get("configs", {})
        }
    )


def entries(table: str, architecture: str) -> list[Entry]:
    """The entries of a table, in the order in which they are asked."""
    found: list[Entry] = tuning.entry_of(architecture, "configs", table)
    return found


def config_of(entry: Entry) -> Config:
    """The configuration that an entry gives."""
    return Config(entry["tile"], entry["warps"], entry["stages"])


def entry_of(config: Config) -> Entry:
    """An entry that gives a configuration to every call."""
    return {"tile": dict(config.tile), "warps": config.warps, "stages": config.stages}


def reachable(entries: list[Entry], itemsize: int) -> list[int]:
    """The numbers of the entries that give a tile to some call with elements of `itemsize` bytes."""
    asked: list[Mapping[str, float]] = []
    found = []
    for number, entry in enumerate(entries):
        most = dict(entry.get("most", {}))
        if "tile" in entry and most.pop("bytes", itemsize) >= itemsize:
            if not any(includes(earlier, most) for earlier in asked):
                found.append(number)
            asked.append(most)
    return found


def includes(earlier: Mapping[str, float], most: Mapping[str, float]) -> bool:
    """Whether whatever keeps the bounds `most` keeps the earlier ones too, so that their entry is asked first."""
    return all(name in most and most[name] <= bound for name, bound in earlier.items())


@contextmanager
def instead(table: str, entries: list[Entry]) -> Iterator[None]:
    """Inside, a table has these entries, on every architecture."""
    first = {tuning.DEFAULT: {"configs": {table: entries}}}
    tables = tuning.tables()
    tables.insert(0, first)
    try:
        yield
    finally:
        tables.remove(first)


def record(call: Call, architecture: str) -> list[Launch] | None:
    """What a call would launch on an architecture; None where Triton leaves it to others."""
    with precision(call.dtype), recorded(architecture) as launches:
        result = in_triton(call.operator)(*call.arguments("meta"))
    return None if result is NotImplemented else launches


def entry_numbers(call: Call, tables: Mapping[str, list[Entry]]) -> dict[str, int] | None:
    """By the name of each table that a call asks, the number of the entry that gives it its tile.

    Args:
        tables: the entries of all tables.

    Returns:
        None where Triton leaves the call to others.
    """
    with ExitStack() as stack:
        for table, found in tables.items():
            # A launcher may fit a tile to its call, but hands the stages on: they carry the number.
            marked = [{**entry, "stages": number} for number, entry in enumerate(found) if "tile" in entry]
            stack.enter_context(instead(table, marked))
        launches = record(call, tuning.DEFAULT)
    asked = ((launch.table, launch.stages) for launch in launches or ())
    numbers = {table: number for table, number in asked if table is not None and table in tables}
    return None if launches is None else numbers
