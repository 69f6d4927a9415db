"""Tables of the gallery, from its record."""

from __future__ import annotations

import re
import statistics
from typing import Any

Json = dict[str, Any]
MIB = 2**20
AXES = ("out", "in")

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
            max(found[dtype]["error"] for found in row["agreement"].values())
            for dtype in ("float64", "float32")
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
    axes = sorted({axis for row in rows for axis in row["agreement"]}, reverse=True)
    equal = sum(
        all(e["equal"] for found in row["agreement"].values() for e in found.values()) for row in rows
    )
    lean = sorted(row["lean"] for row in rows)
    ratio = {axis: statistics.median(row["ours"][axis] / row["dense"] for row in rows) for axis in AXES}
    libraries = {row["library"] for row in rows}
    counts = " and ".join(
        f"{sum(r['library'] == each for r in rows)} of {each}" for each in sorted(libraries)
    )
    worst = {
        dtype: max(found[dtype]["error"] for row in rows for found in row["agreement"].values())
        for dtype in ("float64", "float32")
    }
    return (
        f"{len(rows)} networks, {counts}: {equal} give the values of masked dense on axis "
        f"{' and '.join(axes)} (largest error "
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
    for note in record.get("continued", []):
        origin += f" Some rows by `{note['command']}`, commit {note['commit']}."
    how = (
        "Two images per batch, fp32 bytes, norms frozen; columns and tolerances are explained in docs/gallery.md and "
        "at the top of benchmarks/gallery.py and benchmarks/gallery_steps.py. Not measured on a GPU yet."
    )
    parts = ["# Gallery", summary(record), how, kinds_table(record), table(record), origin]
    return "\n\n".join(parts) + "\n"
