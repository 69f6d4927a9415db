"""Rows as a record for JSON, as a table for a terminal or a Markdown page, and as CSV."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_bwd.measure.bench.asked import Asked
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.measure.text_table import aligned

Row = Mapping[str, Any]
VERSION, MIB, GIGA = 1, 2**20, 1e9
PARTS = ("forward", "backward", "optimizer", "step")
WIDTH = 140  # of text that goes to no terminal
COLUMNS = (
    "case", "weights", "channels", "layers", "forward", "backward", "optimizer", "step ms", "time / dense", "saved",
    "peak", "peak / dense", "grads", "state", "GFLOPs", "images/s", "J",
)  # fmt: skip
CAPTION = (
    "Times are medians in ms, sizes MiB. Saved: kept from forward to backward. Peak: highest allocation of a step "
    "above what is alive before it. State: of the optimizer. GFLOPs: of backward. J: energy of a step, where the "
    "machine counts it. Time / dense is measured in the same interleaved rounds; dense beside itself shows the noise."
)


def record(asked: Asked, rows: Sequence[Row], finished: bool, module: str) -> dict[str, Any]:
    """Everything, with where it comes from; `module` is what this process runs."""
    return {
        "version": VERSION,
        "kind": "bench",
        "command": command_line(module),
        "commit": commit(Path(__file__).parent),
        "date": datetime.date.today().isoformat(),
        "machine": machine(asked.device),
        "asked": asked.to_dict(),
        "finished": finished,
        "rows": list(rows),
    }


def title(found: Mapping[str, Any]) -> str:
    """What was measured, in a line."""
    asked, where = found["asked"], found["machine"]
    threads = asked["threads"] or where["threads"]
    place = where.get("gpu") or f"{where['processor']}, {threads} thread{'s' if threads != 1 else ''}"
    norms = f"norms {asked['batch_norm']}"
    return (
        f"{asked['model']}, batch {asked['batch']} at {asked['size']}x{asked['size']}, {asked['dtype']}, {norms}, "
        f"{asked['optimizer']}, on {place}"
    )


def over_dense(row: Row, rows: Sequence[Row]) -> list[str]:
    """Time and peak over those of dense, which has no figures where it has no room."""
    if rows[0]["error"]:
        return ["-", "-"]
    return [f"{row['ratio']:.2f}", f"{row['peak'] / rows[0]['peak']:.2f}"]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A row by COLUMNS; of a case without figures the name and why."""
    if row["error"]:
        return [row["name"], row["error"]]
    mib = [f"{row[key] / MIB:,.1f}" for key in ("saved", "peak", "gradients", "optimizer")]
    low, middle, high = row["ms"]["step"]
    time, peak = over_dense(row, rows)
    return [
        row["name"],
        *(f"{row[key]:,}" if row.get(key) else "-" for key in ("weights", "channels", "layers")),
        *(f"{row['ms'][part][1]:.3g}" for part in PARTS[:-1]),
        f"{middle:.4g} ({low:.4g}-{high:.4g})",
        time,
        *mib[:2],
        peak,
        *mib[2:],
        "-" if row["flops"] is None else f"{row['flops'] / GIGA:.2f}",
        f"{row['images_per_s']:.4g}",
        "" if row["joules"] is None else f"{row['joules']:.3g}",
    ]


def render(found: Mapping[str, Any], width: int | None = None) -> str:
    """For a terminal: a table without the columns that say the least, and a line for each case without figures."""
    rows = found["rows"]
    complete = [cells(row, rows) for row in rows if not row["error"]]
    hidden = ("channels", "layers", "optimizer", "state", "images/s", "J")
    shown = [place for place, name in enumerate(COLUMNS) if name not in hidden]
    table = aligned(
        [COLUMNS[place] for place in shown],
        [tuple(every[place] for place in shown) for every in complete],
        width or WIDTH,
    )
    failed = [f"{row['name']}: {row['error']}" for row in rows if row["error"]]
    return "\n".join([title(found), "", table, *failed, CAPTION])


def markdown(found: Mapping[str, Any]) -> str:
    """The whole table for a page."""
    rows = found["rows"]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
    for row in rows:
        every = cells(row, rows)
        lines.append("| " + " | ".join([*every, *[""] * (len(COLUMNS) - len(every))]) + " |")
    return "\n".join(lines)


def flat(row: Row) -> dict[str, Any]:
    """A row without nested values: quantiles as forward_p20 and so on; per-layer figures left out."""
    return dict(_flat(row))


def _flat(row: Row) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if key in ("ms", "dense_ms") and value is not None:
            prefix = "" if key == "ms" else "dense_"
            for part in PARTS:
                for quantile, ms in zip(("p20", "p50", "p80"), value[part], strict=True):
                    yield f"{prefix}{part}_{quantile}_ms", ms
        elif key != "parts":
            yield key, value


def to_csv(rows: Sequence[Row]) -> str:
    """All rows, with every column that one of them has; sizes in bytes."""
    flattened = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flattened for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flattened)
    return buffer.getvalue()
