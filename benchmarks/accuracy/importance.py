"""Is velocity importance? What one epoch that trains only one tenth of the weights does to the loss, by their velocity.

    python -m benchmarks.accuracy.importance --plan benchmarks/plans/small.json --data signs=signs.zip \
        --data cifar10=FOLDER --weights mobilenet_v2=FILE --out DIR --report benchmarks/results/accuracy/importance

The plan's velocity runs (--method, --budget) are made again up to the end of epoch --after, at the learning rate that
the grid in DIR has found. There the channels are sorted by a score and cut into ten parts of equal weights; from the
very same state, each part is trained for one epoch (`parts.py`). STEM.jsonl gets a line per finished part; the same
command goes on after a stop. Then writes STEM.md and STEM.png from what is finished. DIR is only read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.accuracy.command import common_parser, guarded
from benchmarks.accuracy.importance_report import report
from benchmarks.accuracy.parts import NONE, PARTS, RANDOM, SCORED, State
from benchmarks.accuracy.plan import Run, read_plan
from benchmarks.accuracy.records import append_line, read_lines
from benchmarks.accuracy.states import Replay, configs_of, first_budget, runs_of
from sparse_bwd.measure.machine import commit
from sparse_bwd.training import RunConfig, Runtime, UserError

# The question and its controls for every run, before the other orders for any.
PASSES = ((NONE, SCORED[0], RANDOM), SCORED[1:])
Key = tuple[str, str, int, float, str, int]


def key_of(line: dict[str, Any] | Any) -> Key:
    """What tells a part from all others; those of another learning rate, as the trials once said, stay apart."""
    return line["data"], line["model"], line["seed"], line["lr"], line["order"], line["part"]


def parts_of(orders: Sequence[str]) -> list[tuple[str, int]]:
    """(order, part) of a pass; the order NONE is one part."""
    return [(order, part) for order in orders for part in range(1, 2 if order == NONE else PARTS + 1)]


def measure(
    runs: Sequence[Run], configs: dict[Run, RunConfig], options: argparse.Namespace, path: Path
) -> None:
    """Adds a line for every part that is missing."""
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    done = {key_of(line) for line in read_lines(path, key_of)}
    for orders in PASSES:
        for run in runs:
            about = {
                "data": run.group.data, "model": run.group.model, "seed": run.seed, "lr": configs[run].recipe.lr,
            }  # fmt: skip
            missing = [
                (order, part)
                for order, part in parts_of(orders)
                if key_of({**about, "order": order, "part": part}) not in done
            ]
            if not missing or (end is not None and time.monotonic() > end):
                continue
            about |= {
                "method": run.group.method, "budget": run.budget, "batch_norm": run.group.batch_norm,
                "after_epochs": options.after, "images": options.images,
                "threads": options.threads, "commit": commit(Path(__file__).parent),
            }  # fmt: skip
            with state_of(configs[run], options) as state:
                for order, part in missing:
                    if end is not None and time.monotonic() > end:
                        break
                    line = {**about, **state.measure(order, part)}
                    append_line(path, line)
                    print(
                        f"{run.name}: {order} {part}: {line['before']} -> {line['after']}",
                        file=sys.stderr,
                        flush=True,
                    )


@contextmanager
def state_of(config: RunConfig, options: argparse.Namespace) -> Iterator[State]:
    """The state of a run at the end of epoch `options.after`, when velocity has chosen for the next one."""
    if not 0 < options.after < config.recipe.epochs:
        raise UserError(
            f"--after is {options.after}; the runs have {config.recipe.epochs} epochs, and one must follow."
        )
    with tempfile.TemporaryDirectory() as folder:
        runtime = Runtime(
            Path(folder), threads=options.threads, data_root=options.data_root, quiet=True, measure=False
        )
        replay = Replay(config, runtime)
        replay.advance(options.after - 1)
        trained = replay.trained
        replay.advance()
        replay.trainer.log.close()
        yield State(replay, trained, options.images)


def parser() -> argparse.ArgumentParser:
    found = common_parser("python -m benchmarks.accuracy.importance", __doc__)
    found.add_argument("--report", type=Path, metavar="STEM", required=True)
    found.add_argument("--method", default="velocity", help="of the runs whose states are taken")
    found.add_argument("--budget", help="of these runs; default: that of the plan's first run")
    found.add_argument("--seeds", type=int, default=3, help="at most so many of each data set")
    found.add_argument("--after", type=int, default=1, help="epochs before the state")
    found.add_argument(
        "--images", type=int, default=400, help="of each set that the loss is taken on, at most"
    )
    found.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return guarded(lambda: measure_and_report(options))


def measure_and_report(options: argparse.Namespace) -> int:
    """What is missing, as far as the time goes, and the page."""
    plan = read_plan(options.plan)
    runs = runs_of(plan, options.method, options.budget or first_budget(plan), options.seeds)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    path = options.report.with_suffix(".jsonl")
    configs = configs_of(plan, runs, options)
    measure(runs, configs, options, path)
    asked = {(run.group.data, run.group.model, run.seed, configs[run].recipe.lr) for run in runs}
    lines = [line for line in read_lines(path, key_of) if key_of(line)[:4] in asked]
    print(report(plan, lines, options.report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
