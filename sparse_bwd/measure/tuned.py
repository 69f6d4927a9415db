"""Tables of tiles as files: what `sparse-bwd tune` and `benchmarks.tune` write, and which one is in use."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparse_bwd.measure import tune
from sparse_bwd.measure.gpu_timer import GpuTimer
from sparse_bwd.measure.representative import representative
from sparse_bwd.measure.tiles import operators
from sparse_bwd.ops import backend, tuning

SHARE_OF_MEMORY = (
    32  # a call that moves more than this part of the GPU's memory is not measured: its copies must fit
)


def why_not() -> str:
    """Why nothing can be measured here; "" where it can."""
    return "this machine has no CUDA device" if not torch.cuda.is_available() else backend.missing("triton")


def versions() -> dict[str, str]:
    """torch and triton, as far as they are installed."""
    found = {"torch": str(torch.__version__)}
    with suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    return found


def measure(
    device: str,
    memory: int,
    progress: tune.Progress,
    only: Sequence[str] | None = None,
    make_timer: Callable[[str], tune.Timer] = GpuTimer,
) -> dict[str, Any]:
    """The order of implementations and the configurations for a GPU with so many bytes of memory, measured on it.

    Raises:
        ValueError: a name in `only` is no table.
    """
    shipped = json.loads(tuning.SHIPPED.read_text())["architectures"][tuning.DEFAULT]
    unknown = sorted(set(only or ()) - set(shipped["configs"]))
    if unknown:
        raise ValueError(
            f"There is no table {', '.join(unknown)}; there are {', '.join(shipped['configs'])}."
        )
    served = operators()
    calls = [
        call
        for call in representative()
        if call.operator in served and call.work.bytes * SHARE_OF_MEMORY <= memory
    ]
    return tune.tune(shipped, calls, make_timer(device), progress, only)


def write(path: Path, architecture: str, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Put what was measured on an architecture into a file, beside those of others; whole or not at all.

    Args:
        about: device, versions, date and command of the measurement.
    """
    table: dict[str, Any] = {"version": tuning.VERSION, "measured": None, "architectures": {}}
    if path.exists():
        before = json.loads(path.read_text())
        table = before if before.get("version") == tuning.VERSION else table
    table["measured"] = {**(table["measured"] or {}), architecture: dict(about)}
    table["architectures"][architecture] = dict(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(render(table))
    os.replace(temporary, path)
    tuning.tables.cache_clear()
    tuning.order.cache_clear()


def render(table: Mapping[str, Any]) -> str:
    """A table as JSON, with an entry in each line."""
    lines = ["{", f'  "version": {table["version"]},', f'  "measured": {json.dumps(table["measured"])},']
    lines.append('  "architectures": {')
    blocks = []
    for name, kinds in table["architectures"].items():
        order = [f"        {json.dumps(key)}: {json.dumps(value)}" for key, value in kinds["order"].items()]
        configs = [
            f"        {json.dumps(key)}: [\n"
            + ",\n".join(f"          {json.dumps(entry)}" for entry in entries)
            + "\n        ]"
            for key, entries in kinds["configs"].items()
        ]
        blocks.append(
            f"    {json.dumps(name)}: {{\n"
            + '      "order": {\n' + ",\n".join(order) + "\n      },\n"
            + '      "configs": {\n' + ",\n".join(configs) + "\n      }\n    }"
        )  # fmt: skip
    return "\n".join([*lines, ",\n".join(blocks), "  }", "}", ""])


def run(
    path: Path,
    device: str,
    command: str,
    progress: tune.Progress,
    only: Sequence[str] | None = None,
    **more: str,
) -> dict[str, Any]:
    """Measure on a GPU, write the file, and return what is said about the measurement.

    Args:
        command, more: what the file says of where it comes from, beside device, versions and date.
    """
    with torch.cuda.device(device):
        found = measure(device, torch.cuda.get_device_properties(device).total_memory, progress, only)
    about = {
        "device": torch.cuda.get_device_name(device),
        **versions(),
        **more,
        "command": command,
        "date": datetime.date.today().isoformat(),
    }
    write(path, backend.architecture(torch.device(device)), found, about)
    return {"path": str(path), "shipped": path == tuning.SHIPPED, "measured": about}


def in_use(architecture: str) -> dict[str, Any]:
    """The file whose tiles an architecture gets, and how they were measured (None: not measured on a GPU yet)."""
    for path in (tuning.user_file(), tuning.SHIPPED):
        if path.exists():
            table = json.loads(path.read_text())
            if {architecture, tuning.DEFAULT} & set(table["architectures"]):
                measured = (table["measured"] or {}).get(architecture)
                return {"path": str(path), "shipped": path == tuning.SHIPPED, "measured": measured}
    raise FileNotFoundError(f"{tuning.SHIPPED} is missing; install the package again.")


def in_words(table: Mapping[str, Any]) -> str:
    """What `in_use` found, in a sentence's part."""
    measured = table["measured"]
    where = "the shipped table" if table["shipped"] else str(table["path"])
    if measured is None:
        return f"{where}, not measured on a GPU yet"
    text = f"{where}, measured on {measured['device']} with torch {measured['torch']} and triton {measured['triton']}"
    here = versions().get("triton")
    if here is not None and here != measured["triton"]:
        text += f"; triton is {here} now: run `sparse-bwd tune` to measure again"
    return text
