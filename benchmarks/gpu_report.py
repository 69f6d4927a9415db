"""The page of `benchmarks.gpu`, from its JSON alone: first the goals beside what was measured, then all of it.

    python -m benchmarks.gpu_report FILE.json

writes FILE.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.gpu_goals import (
    NAMES,
    NOISE,
    NOT_MEASURED,
    PRECISIONS,
    Row,
    best,
    copy_rate,
    fastest,
    geometric,
    goals_table,
    judged,
    p50,
    product_rate,
    rows,
    shares_of,
    speedups,
)
from benchmarks.step import write

MIB = 2**20
FAMILIES = ("depthwise", "1x1", "linear", "k x k")


def ceilings_lines(record: Row) -> list[str]:
    rate = copy_rate(record)
    if rate is None:
        return [f"Ceilings: {NOT_MEASURED}."]
    products = []
    for dtype in PRECISIONS:
        speed = product_rate(record, dtype)
        products += [f"{NAMES[dtype]} {speed / 1e9:,.0f} TFLOP/s"] if speed is not None else []
    return [
        f"Ceilings of this run: a copy of {rows(record, 'ceilings')[0]['copy'][0] / 2 / MIB:,.0f} MiB moves "
        f"{rate / 1e6:,.0f} GB/s (bytes read and written over the time); a large matrix product reaches "
        f"{', '.join(products)}."
    ]


def _spread(values: list[float]) -> str:
    return f"{values[1]:.4g} ({values[0]:.4g} to {values[2]:.4g})"


def _mib(value: int | None) -> str:
    return "" if value is None else f"{value / MIB:,.0f}"


def steps_lines(record: Row) -> list[str]:
    """One table of all variants of all networks."""
    found = rows(record, "step")
    if not found:
        return [f"{NOT_MEASURED.capitalize()}."]
    lines = [
        "| network | precision | variant | layout | ms, p50 (p20 to p80) | / dense | saved MiB | held MiB "
        "| peak MiB | / dense | reserved MiB |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        dense = best(record, row["network"], row["dtype"], "dense")
        for layout, kinds in row["variants"].items():
            for name, variant in kinds.items():
                time = f"{p50(variant['ms']) / p50(dense['ms']):.2f}" if dense else ""
                peak = f"{variant['peak'] / dense['peak']:.2f}" if dense else ""
                lines.append(
                    f"| {row['network']} | {NAMES[row['dtype']]} | {name} | {layout} | {_spread(variant['ms'])} "
                    f"| {time} | {_mib(variant['saved'])} | {_mib(variant['held'])} | {_mib(variant['peak'])} | {peak} "
                    f"| {_mib(variant['reserved'])} |"
                )
    return lines


def roofline(record: Row, row: Row, share: str) -> float | None:
    """The least time, by bytes or by operations, over the measured one."""
    rate, multiply = copy_rate(record), product_rate(record, row["dtype"])
    ours = fastest(row, "ours", share)
    if rate is None or multiply is None or ours is None:
        return None
    nbytes, operations = row["work"][share]
    return float(max(nbytes / rate, operations / multiply) / ours)


def summary_lines(record: Row) -> list[str]:
    """Geometric means over the layers of each family."""
    lines = [
        "| weight gradient | precision | k/C | layers | faster than dense | slowest | faster than gather | slowest "
        "| of the roofline |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in FAMILIES:
        for dtype in PRECISIONS:
            found = rows(record, "dw", family=kind, dtype=dtype)
            for share in shares_of(found[0]) if found else []:
                dense, gather = (speedups(found, over, share) for over in ("dense", "gather"))
                parts = [value for row in found if (value := roofline(record, row, share)) is not None]
                means = [f"{geometric(v):.2f}x | {min(v):.2f}x" if v else " | " for v in (dense, gather)]
                part = f"{geometric(parts):.0%}" if parts else ""
                lines.append(
                    f"| {kind} | {NAMES[dtype]} | {float(share):g} | {len(dense)} | {' | '.join(means)} | {part} |"
                )
    return lines if len(lines) > 2 else [f"{NOT_MEASURED.capitalize()}."]


def layer_lines(record: Row) -> list[str]:
    """Every layer: dense in both layouts, and at each share ours and, in brackets, gather in their faster ones."""
    lines: list[str] = []
    for row in rows(record, "dw"):
        if not lines:
            shares = " | ".join(f"k/C {share}" for share in row["work"])
            lines = [
                f"| layer | precision | dense NCHW | dense channels_last | {shares} |",
                f"|---|---|--:|--:|{'--:|' * len(row['work'])}",
            ]
        dense = [row["ms"].get(layout, {}).get("dense") for layout in ("nchw", "channels_last")]
        if row["family"] == "linear":
            dense = [row["ms"][""]["dense"], None]
        cells = [f"{p50(each['1']):.4g}" if each else "" for each in dense]
        for share in row["work"]:
            ours, gather = (fastest(row, name, share) for name in ("ours", "gather"))
            cells.append(f"{ours:.4g} ({gather:.4g})" if ours is not None and gather is not None else "")
        lines.append(f"| {row['layer']} | {NAMES[row['dtype']]} | {' | '.join(cells)} |")
    return lines or [f"{NOT_MEASURED.capitalize()}."]


def bandwidth_lines(record: Row) -> list[str]:
    """Operators that only move data."""
    rate, found = copy_rate(record), rows(record, "bandwidth")
    if not found:
        return [f"{NOT_MEASURED.capitalize()}."]
    lines = [
        "| operator | shape | precision | layout | implementation | ms, p50 (p20 to p80) | GB/s | / copy |",
        "|---|---|---|---|---|--:|--:|--:|",
    ]
    for row in found:
        for name, spread in row["ms"].items():
            speed = row["work"][0] / p50(spread)
            part = f"{speed / rate:.0%}" if rate else ""
            lines.append(
                f"| `{row['operator']}` | {row['shape']} | {NAMES[row['dtype']]} | {row['layout']} | {name} "
                f"| {_spread(spread)} | {speed / 1e6:,.0f} | {part} |"
            )
    return lines


def state_lines(record: Row) -> list[str]:
    """What the tests said, what was left out, what failed."""
    left, failed = record["left_out"], record["failed"]
    said = (
        "**The GPU tests were not run.**" if record["tests"] == "skipped" else f"GPU tests {record['tests']}."
    )
    lines = [said, ""]
    if left:
        lines += [f"No time was left for {len(left)} of the measurements: {'; '.join(left)}.", ""]
    if failed:
        lines += ["Failed:", "", *(f"- {name}: {reason}" for name, reason in failed.items()), ""]
    return lines


def heading_lines(record: Row) -> list[str]:
    """The goals, and how their figures are to be read."""
    verdicts = [verdict for _, found in judged(record) for verdict in found.values() if verdict is not None]
    quick = "Quick: every kind of row once, in few rounds; means stand on one layer or shape. "
    return [
        *goals_table(record),
        "",
        f"{(quick if record['quick'] else '')}Of {len(verdicts)} goals measured, counting each precision, "
        f"{sum(verdict.met for verdict in verdicts)} are met. Ratios compare medians, each side in the faster of NCHW "
        f'and channels_last; "never slower" allows {NOISE - 1:.0%} of noise; means are over the distinct layers. '
        "fp32: products are exact; TF32: convolutions and products may use it; bf16: values, and autocast in steps.",
        "",
        *state_lines(record),
        *ceilings_lines(record),
    ]


def page(record: Row) -> str:
    """The report as Markdown."""
    where = record["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in where["versions"].items())
    driver = f", driver {where['driver']}" if "driver" in where else ""
    steps = sorted({f"{row['batch']} at {row['size']}x{row['size']}" for row in rows(record, "step")})
    source = (
        f"`{record['command']}`, commit {record['commit']}, {record['date']}, {record.get('seconds', 0)} s, "
        f"{record['rounds']} rounds, {versions}{driver}."
    )
    parts: dict[str, list[str]] = {
        f"# Operators and training steps on {where.get('gpu', where['processor'])}": heading_lines(record),
        "## Training steps": [
            STEPS + f" Batch and image: {', '.join(steps) or 'none'}.",
            "",
            *steps_lines(record),
        ],
        "## Weight gradients": [GRADIENTS, "", *summary_lines(record)],
        "## Operators that move data": bandwidth_lines(record),
        "## Weight gradients of every layer": [EVERY, "", *layer_lines(record), "", source],
    }
    return "\n".join(line for title, lines in parts.items() for line in (title, "", *lines, ""))


STEPS = """\
Forward, loss, backward and an SGD step with momentum; norms frozen; ours trains 10 % of the channels of every
convolution and the classifier, dense all weights but the norms'. "/ dense": over eager dense in its faster layout.
Saved: what autograd keeps for backward; held: what the allocator has given out after the forward; peak and reserved:
above what was alive, or taken from the driver, before the step."""
GRADIENTS = """\
Geometric means over layers, both sides in their faster layout. Dense is PyTorch's gradient of the whole weight; gather
is the selected slices of dy through cuDNN or cuBLAS. Roofline: the least bytes at the copy's bandwidth, or the
operations at the rate of the matrix product where that takes longer, over the measured time."""
EVERY = """\
p50 in ms: dense in both layouts (a Linear has one), ours and in brackets gather in their faster ones. The JSON has the
rest: p20 and p80, both layouts, each implementation."""


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    write(path.with_suffix(".md"), page(json.loads(path.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
