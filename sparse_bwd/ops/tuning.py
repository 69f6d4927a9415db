"""Which implementation serves an operator, and in which tiles: data per architecture, never measured at run time.

`tuning.json` beside this file is what the library ships. `sparse-bwd tune` measures on a user's GPU and writes the same
format to `user_file()`, which goes before it. An architecture without an entry uses "default".

    {"version": 1, "measured": null or where and how, "architectures": {"default" | "sm_90" | ...: {
        "order": {operator: [implementations, the first that serves a call wins]},
        "configs": {kernel: [{"most": {size: bound}, "tile": {...}, "warps": 4, "stages": 3}, ...]}}}}

The first config whose bounds hold is taken; one without a tile leaves the call to the next implementation.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
SHIPPED = Path(__file__).with_name("tuning.json")
DEFAULT = "default"


class Config(NamedTuple):
    """Sizes of a kernel's tile by the name of their constant, and how many warps and pipeline stages work on it."""

    tile: Mapping[str, int]
    warps: int
    stages: int


def user_file() -> Path:
    """Where `sparse-bwd tune` keeps what it measured on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sparse_bwd" / "tuning.json"


@functools.cache
def tables() -> list[dict[str, Any]]:
    """The tables in the order in which they are asked."""
    found = [_read(path) for path in (user_file(), SHIPPED) if path.exists()]
    return [table["architectures"] for table in found]


def _read(path: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(path.read_text())
    if table.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {table.get('version')}, not {VERSION}; delete it and run `sparse-bwd tune` again."
        )
    return table


def entry_of(architecture: str, kind: str, name: str) -> Any:
    """What the tables say of the "order" of an operator or the "configs" of a kernel; KeyError if nothing."""
    for table in tables():
        for key in (architecture, DEFAULT):
            entry = table.get(key, {}).get(kind, {}).get(name)
            if entry is not None:
                return entry
    raise KeyError(f"No table has an entry for {kind} {name}.")


@functools.cache
def order(operator: str, architecture: str) -> tuple[str, ...]:
    """Implementations of an operator, best first."""
    return tuple(entry_of(architecture, "order", operator))


def config(kernel: str, architecture: str, must: bool, **sizes: float) -> Config | None:
    """The configuration for a call with these sizes; None where another implementation serves it better.

    Args:
        must: take the first that has a tile, also where the table would leave the call to others.
        sizes: what the table's bounds speak of.
    """
    for entry in entry_of(architecture, "configs", kernel):
        if all(sizes[name] <= bound for name, bound in entry.get("most", {}).items()):
            if "tile" in entry:
                return Config(entry["tile"], entry["warps"], entry["stages"])
            if not must:
                return None
    raise KeyError(f"No configuration of {kernel} is for {sizes}.")


def configs(kernel: str, architecture: str) -> list[Config]:
    """Every configuration of a kernel that the tables may give on an architecture."""
    entries = entry_of(architecture, "configs", kernel)
    return [Config(e["tile"], e["warps"], e["stages"]) for e in entries if "tile" in e]
