"""The whole benchmark: every case, and its files, which are written again after each so that none is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_bwd.files import write_json, write_text
from sparse_bwd.measure.bench.asked import Asked, Case
from sparse_bwd.measure.bench.processes import run_all, run_case
from sparse_bwd.measure.bench.report import Row, record, to_csv
from sparse_bwd.training.models import build_model, check_width


def check_model(asked: Asked) -> None:
    """UserError unless the network exists and takes such images."""
    torch.manual_seed(asked.seed)
    model = build_model(asked.model, asked.classes)
    check_width(model, asked.classes, asked.size, asked.model)


def run(
    asked: Asked,
    cases: list[Case],
    out: Path,
    seconds: float,
    progress: Callable[[int], None] = lambda done: None,
    run_one: Callable[[Asked, Case, str, float], Any] = run_case,
    module: str = "sparse_bwd",
) -> dict[str, Any]:
    """Measure all cases; leaves bench.json, bench.csv and, at the end, bench.html in `out`.

    `module` is what this process runs, for the command that the record names.
    """
    out.mkdir(parents=True, exist_ok=True)

    def each(rows: Sequence[Row]) -> None:
        write(out, record(asked, rows, len(rows) == len(cases), module))
        progress(len(rows))

    rows = run_all(asked, cases, seconds, each, run_one)
    found = record(asked, rows, True, module)
    from sparse_bwd.measure.bench.page import page

    write_text(out / "bench.html", page(found))
    return found


def write(out: Path, found: dict[str, Any]) -> None:
    """bench.json and bench.csv."""
    write_json(out / "bench.json", found)
    write_text(out / "bench.csv", to_csv(found["rows"]))
