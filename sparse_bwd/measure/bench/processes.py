"""A process for every case: what it leaves behind ends with it, and a crash is a cell of the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparse_bwd.measure.bench.asked import Asked, Case
from sparse_bwd.measure.bench.one import NO_DENSE, Row, measure
from sparse_bwd.measure.bench.strategies import STRATEGIES
from sparse_bwd.training.errors import UserError

MODULE = "sparse_bwd.measure.bench.processes"
NO_MEMORY = "out of memory"
LAST_WORDS = 300  # characters of an error that stay in its row


def run_case(asked: Asked, case: Case, dense_layout: str, seconds: float) -> Row:
    """The row of a case, measured in a new process; with "error" where there are no figures."""
    row: Row = {**asdict(case), "name": case.name, "error": None}
    reason = STRATEGIES[case.strategy].why_not()
    if reason:
        return row | {"error": reason}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        words = json.dumps([asked.to_dict(), asdict(case), dense_layout, str(target)])
        try:
            done = subprocess.run(
                [sys.executable, "-m", MODULE, words],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return row | {"error": f"took longer than {seconds:g} s"}
        if target.exists():
            row.update(json.loads(target.read_text()))
            return row
    return row | {"error": reason_of(done.returncode, done.stderr)}


def reason_of(code: int, stderr: str) -> str:
    """Why a process ended without a row."""
    if code == -signal.SIGKILL:
        return f"{NO_MEMORY} (the system ended the process)"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = stderr.strip().splitlines()
    return f"exit code {code}: {lines[-1][:LAST_WORDS] if lines else 'nothing was said'}"


def in_words(error: BaseException) -> str:
    """An error as a cell."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return NO_MEMORY
    return (text if isinstance(error, (UserError, AssertionError)) else f"{type(error).__name__}: {text}")[
        :LAST_WORDS
    ]


def run_all(
    asked: Asked,
    cases: list[Case],
    seconds: float,
    each: Callable[[list[Row]], None],
    run: Callable[[Asked, Case, str, float], Row] = run_case,
) -> list[Row]:
    """The rows of all cases; `each` gets those that are there after every one.

    The first case is dense, which finds its faster layout for all others. Where dense has no room, they go without.

    Raises:
        UserError: dense PyTorch fails for another reason than memory, so that there is nothing to be right by.
    """
    rows: list[Row] = []
    layout = ""
    for case in cases:
        rows.append(run(asked, case, layout, seconds))
        if not layout:
            error = rows[0]["error"]
            if error and not error.startswith(NO_MEMORY):
                raise UserError(f"Dense {asked.model} cannot be measured: {error}.")
            layout = NO_DENSE if error else rows[0]["dense_layout"]
        each(rows)
    return rows


def main(words: str) -> None:
    """Measure what `run_case` has written down."""
    given: list[Any] = json.loads(words)
    asked, case, layout, target = Asked(**given[0]), Case(**given[1]), given[2], Path(given[3])
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        row: Row = measure(asked, case, layout)
    except Exception as error:
        row = {"error": in_words(error)}
    target.write_text(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1])
