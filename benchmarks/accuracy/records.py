"""runs.jsonl: one JSON line per finished run. Lines are only ever added; one that a kill has torn is not read.

Keys: data, model, method, policy, axis, budget, batch_norm, seed: the run; stage "run" or "trial" (tested on images
held back); lr, epochs, image_size, accuracy (last epoch; null: diverged, see "error"), accuracy_per_epoch,
train_accuracy_per_epoch, trained_weights (true cost of the last selection), saved_bytes, peak_bytes, training_bytes,
ms_per_step, steps, choosing_seconds (of all selections), backward_flops, selection (file with every epoch's channels),
warnings, options, threads, versions, commit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.plan import Run

KEYS = ("data", "model", "method", "batch_norm")


def key_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """`Run.key` of the run that a line is of."""
    words = (*(record[name] for name in KEYS), record["budget"] or "", str(record["seed"]))
    return words if record["stage"] == "run" else (*words, repr(float(record["lr"])))


class Records:
    """The finished runs of a folder: those of every shard are read, lines are added to `name` alone."""

    def __init__(self, folder: Path, name: str = "runs.jsonl") -> None:
        self.path = folder / name
        self._found: dict[tuple[str, ...], dict[str, Any]] = {}
        for path in sorted(folder.glob("runs*.jsonl")):
            for record in read_lines(path):
                self._found[key_of(record)] = record

    def get(self, run: Run) -> dict[str, Any] | None:
        """The line of a run; None if it is not finished."""
        return self._found.get(run.key)

    def all(self, stage: str = "run") -> list[dict[str, Any]]:
        """All lines of a stage."""
        return [record for record in self._found.values() if record["stage"] == stage]

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a line and waits until it is on the disk."""
        append_line(self.path, record)
        self._found[key_of(record)] = dict(record)


def read_lines(path: Path, key: Callable[[Mapping[str, Any]], object] = key_of) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; ValueError, naming the line, for one that is whole and has no `key`."""
    if not path.exists():
        return
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is not the record of a run: {error}.") from error
        yield record


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line to a file, in place of what a kill has left of one, and waits until it is on the disk."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with open(path, "ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
