"""Accuracy of every policy at the same true budget, with memory and time: a plan of fine-tuning runs and its report.

    python -m benchmarks.accuracy --plan benchmarks/plans/small.json --data signs=signs.zip --data cifar10=FOLDER \
        --weights mobilenet_v2=FILE --out DIR --jobs 2

DIR/runs.jsonl gets a line per finished run. After a stop or a kill at any moment the same command goes on. With
`--shard i/n` (n processes or machines, one folder) a shard writes runs-i-of-n.jsonl. `--report STEM` writes, from what
is finished, STEM.md, its figures, STEM.jsonl and STEM-trials.jsonl, in place of running.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.accuracy.command import common_parser, find_data, find_weights, guarded
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.plan import Plan, read_plan
from benchmarks.accuracy.records import Records
from sparse_bwd.files import write_json
from sparse_bwd.training import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return guarded(lambda: run_or_report(read_plan(options.plan), options))


def run_or_report(plan: Plan, options: argparse.Namespace) -> int:
    """What the options ask for."""
    if options.report:
        from benchmarks.accuracy.report import report

        print(report(plan, Records(options.out), options.report, options.times))
        return 0
    return run(plan, options)


def parser() -> argparse.ArgumentParser:
    found = common_parser("python -m benchmarks.accuracy", __doc__)
    found.add_argument("--download", action="store_true", help="fetch torchvision's data sets")
    found.add_argument("--device", default="cpu")
    found.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    found.add_argument(
        "--shard", default="1/1", metavar="I/N", help="every n-th group of runs, from the i-th"
    )
    found.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    found.add_argument("--report", type=Path, metavar="STEM")
    found.add_argument("--times", type=Path, help="of the report: what benchmarks.accuracy.choosing wrote")
    return found


def run(plan: Plan, options: argparse.Namespace) -> int:
    """Everything of the plan that is missing in the folder."""
    number, of = _shard(options.shard)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = plan.shard(number, of)
    sources, weights = find_data(plan, runs, options, options.download), find_weights(plan, options)
    name = "runs.jsonl" if of == 1 else f"runs-{number}-of-{of}.jsonl"
    runtime = {
        "device": options.device, "threads": options.threads, "data_root": options.data_root,
        "download": options.download, "checkpoint_minutes": 1.0,
    }  # fmt: skip
    with _alone(options.out / f".{name}.lock"):
        belong(options.out, plan)
        records = Records(options.out, name)
        grid = Grid(
            plan, runs, options.out, records, sources, weights, runtime, options.jobs, options.minutes
        )
        return 1 if grid.carry_out() else 0


def belong(folder: Path, plan: Plan) -> None:
    """UserError if the folder has runs of a plan under whose names other runs were meant: a line says names only.

    Seeds, budgets to run and learning rates on trial may change from call to call.
    """
    path = folder / ".plan.json"
    meant = {
        "recipe": {"": plan.recipe},
        "data": plan.data,
        "models": plan.models,
        "methods": {name: entry["options"] for name, entry in plan.methods.items()},
        "budgets": plan.budgets,
    }
    before = json.loads(path.read_text()) if path.exists() else {kind: {} for kind in meant}
    changed = [
        f"{kind} {name}".strip()
        for kind, entries in before.items()
        for name, entry in entries.items()
        if meant[kind].get(name, entry) != entry
    ]
    if changed:
        raise UserError(
            f"{folder} holds runs that this plan means otherwise ({', '.join(changed)}); give another --out."
        )
    write_json(path, {kind: {**before[kind], **meant[kind]} for kind in meant})


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise UserError(f"--shard is '{text}'; it must be i/n with 1 <= i <= n, such as 2/8.")
    return int(number), int(of)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """UserError if another process writes the same file of records."""
    with open(lock, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # pragma: no cover -- Windows
            pass
        except OSError as error:
            raise UserError(
                f"Another process works on {lock.parent}; give this one another --out."
            ) from error
        yield


if __name__ == "__main__":
    sys.exit(main())
