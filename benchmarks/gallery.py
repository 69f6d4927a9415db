"""Sixty networks of torchvision and timm, made small: does training a tenth give dense's values, and what became lean?

    python -m benchmarks.gallery --out benchmarks/results

Per network two training steps, ours beside masked dense (`gallery_steps.py`), on both axes, then bytes of one forward:

    dense        saved bytes of the plain network, trained whole, norms on the statistics that they have
    ours         saved bytes of the converted one with a random tenth of the weights selected
    lean share   1 - S / dense. S: storages that a module which was not converted, or an operation in a forward, keeps
                 of the converted network with every layer trained whole; also where a converted layer keeps them too

So the lean share is the part of dense's bytes about which our layers alone decide, whatever is selected. What is in S,
by whom and why, is what `sb.memory.explain` says. Writes gallery.json and gallery.md.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from benchmarks.gallery_networks import ARCHITECTURES, BATCH
from benchmarks.gallery_steps import TOLERANCE, Agreement, agreement, batches, converted, network
from sparse_bwd.files import write_json
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.memory import explain, saved_bytes

Json = dict[str, Any]
MIB = 2**20
AXES = ("out", "in")


def measure(name: str) -> Json:
    """One network: how far its training is from dense on both axes, and its bytes."""
    began = time.perf_counter()
    agreed = {axis: agreement(name, axis) for axis in AXES}
    return {
        "network": name,
        "library": ARCHITECTURES[name].library,
        "size": ARCHITECTURES[name].size,
        **coverage(name),
        "agreement": {axis: _errors(found) for axis, found in agreed.items()},
        "seconds": time.perf_counter() - began,
    }


def _errors(found: dict[torch.dtype, Agreement]) -> Json:
    """Per dtype the largest error and whether it is tolerated."""
    return {
        str(dtype).removeprefix("torch."): {
            "error": value.error,
            "where": value.where,
            "equal": value.error <= TOLERANCE[dtype] and not value.moved,
            "parameters": value.parameters,
        }
        for dtype, value in found.items()
    }


def coverage(name: str) -> Json:
    """Bytes of one forward, dense and ours; what of dense's is left to stock code, by reason, most first."""
    plain, images = network(name), batches(name)[0][0]
    found: Json = {"dense": saved_bytes(lambda: plain(images), plain), "ours": {}}
    for axis in AXES:
        model, report, _ = converted(plain, axis)
        found["ours"][axis] = saved_bytes(lambda: model(images), model)  # noqa: B023 -- called at once
    left = left_dense(plain, images)
    return {
        "parameters": sum(p.numel() for p in plain.parameters()),
        "converted": len(report.swapped),
        "skipped": len(report.skipped),
        "outside": len(report.outside),
        **found,
        "lean": 1 - sum(left.values()) / found["dense"],
        "left": dict(sorted(left.items(), key=lambda item: -item[1])),
    }


def left_dense(plain: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """Reason -> bytes that modules which were not converted and operations in forwards keep: the S of above."""
    model = copy.deepcopy(plain)
    sb.convert(model)
    sb.FullPolicy(model).step()
    found: dict[str, int] = {}
    explained = explain(model, images)
    for row in explained.rows:
        keepers = [keeper for keeper in row.keepers if keeper in explained.dense]
        if keepers:
            reason = explained.dense[keepers[0]]
            found[reason] = found.get(reason, 0) + row.nbytes
    return found


# Reasons of `explain` as words of a table, and what they have in common.
_KINDS = (
    (r"operations in the forward of (\w+)", "operations in a forward"),
    (r"subclass: [\w.]*?(\w+) is not", "subclass of a stock layer"),
    (r"bypassed by its parent (\w+)", "its parent reads its weight"),
    (r"(\w+) has no lean version", "no lean version"),
    (r"(trained whole), beside", "trained whole on purpose: classifier"),
)


def kind_of(reason: str) -> tuple[str, str]:
    """A reason of `explain` as (kind, class that it names)."""
    for pattern, kind in _KINDS:
        if match := re.search(pattern, reason):
            return kind, match[1]
    return reason, ""


def table(record: Json) -> str:
    """A row per network."""
    lines = [
        "| network | params | converted / skipped | dense MiB | ours MiB, out | in | of dense | lean share "
        "| largest that stays dense (share of dense's bytes) | error, fp64 | fp32 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for row in record["networks"]:
        reason, amount = next(iter(row["left"].items()), ("", 0))
        kind, name = kind_of(reason)
        stays = (
            f"{kind}{f' ({name})' if name else ''}: {100 * amount / row['dense']:.0f} %"
            if amount
            else "nothing"
        )
        ours, dense = (row["ours"][axis] for axis in AXES), row["dense"]
        wide, narrow = (
            max(row["agreement"][axis][dtype]["error"] for axis in AXES) for dtype in ("float64", "float32")
        )
        sizes = " | ".join(f"{each / MIB:.2f}" for each in ours)
        shares = " / ".join(f"{row['ours'][axis] / dense:.2f}" for axis in AXES)
        lines.append(
            f"| {row['network']} | {row['parameters'] / 1e6:.2f} M | {row['converted']} / {row['skipped']} "
            f"| {dense / MIB:.2f} | {sizes} | {shares} | {100 * row['lean']:.0f} % | {stays} "
            f"| {wide:.0e} | {narrow:.0e} |"
        )
    return "\n".join(lines)


def kinds_table(record: Json) -> str:
    """What stays dense by kind: in how many networks, its share of their dense bytes, the classes that keep most."""
    shares: dict[str, dict[str, float]] = {}
    classes: dict[str, dict[str, float]] = {}
    for row in record["networks"]:
        for reason, amount in row["left"].items():
            kind, name = kind_of(reason)
            share = amount / row["dense"]
            per_network = shares.setdefault(kind, {})
            per_network[row["network"]] = per_network.get(row["network"], 0.0) + share
            per_class = classes.setdefault(kind, {})
            per_class[name] = per_class.get(name, 0.0) + share
    lines = [
        "| what stays dense | networks | share of dense's bytes there, median (most) | classes, most first |"
    ]
    lines.append("|---|--:|--:|---|")
    for kind, found in sorted(shares.items(), key=lambda item: -sum(item[1].values())):
        names = sorted((n for n in classes[kind] if n), key=lambda n: -classes[kind][n])
        words = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        lines.append(
            f"| {kind} | {len(found)} | {100 * statistics.median(found.values()):.1f} % "
            f"({100 * max(found.values()):.0f} %) | {words} |"
        )
    return "\n".join(lines)


def summary(record: Json) -> str:
    """The result in one sentence per question."""
    rows = record["networks"]
    equal = sum(all(e["equal"] for axis in AXES for e in row["agreement"][axis].values()) for row in rows)
    lean = sorted(row["lean"] for row in rows)
    ratio = {axis: statistics.median(row["ours"][axis] / row["dense"] for row in rows) for axis in AXES}
    libraries = {row["library"] for row in rows}
    counts = " and ".join(
        f"{sum(r['library'] == each for r in rows)} of {each}" for each in sorted(libraries)
    )
    worst = {
        dtype: max(row["agreement"][axis][dtype]["error"] for row in rows for axis in AXES)
        for dtype in ("float64", "float32")
    }
    return (
        f"{len(rows)} networks, {counts}: {equal} give the values of masked dense on both axes (largest error "
        f"{worst['float64']:.0e} in fp64, {worst['float32']:.0e} in fp32). Lean share: median "
        f"{100 * statistics.median(lean):.0f} %, from {100 * lean[0]:.0f} to {100 * lean[-1]:.0f} %; "
        f'median of ours / dense at a tenth of the weights: {ratio["out"]:.2f} on axis "out", '
        f'{ratio["in"]:.2f} on "in".'
    )


def page(record: Json) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in record["machine"]["versions"].items())
    origin = (
        f"`{record['command']}`, commit {record['commit']}, {record['machine']['processor']}; {versions}."
    )
    how = (
        f"Batch {BATCH}, fp32 bytes, norms frozen; columns and tolerances as in docs/gallery.md and at the top of "
        "benchmarks/gallery.py and benchmarks/gallery_steps.py. Not measured on a GPU yet."
    )
    parts = ["# Gallery", summary(record), how, kinds_table(record), table(record), origin]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="A gallery of networks: values and coverage.")
    parser.add_argument("--out", type=Path, default=Path("gallery-results"))
    parser.add_argument("--networks", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: Json = {
        "version": 1, "command": command_line("benchmarks.gallery"),
        "commit": commit(Path(__file__).parent), "machine": machine(), "networks": [],
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        row = measure(name)
        record["networks"].append(row)
        errors = {axis: {k: e["error"] for k, e in row["agreement"][axis].items()} for axis in AXES}
        print(f"{name}: lean {100 * row['lean']:.0f} %, {errors}, {row['seconds']:.0f} s", flush=True)
        write_json(options.out / "gallery.json", record)
    (options.out / "gallery.md").write_text(page(record))


if __name__ == "__main__":
    main()
