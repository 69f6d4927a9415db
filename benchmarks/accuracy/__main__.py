"""Accuracy of every policy at the same true budget, with memory and time: a plan of fine-tuning runs and its report.

    python -m benchmarks.accuracy --plan benchmarks/plans/small.json --data signs=signs.zip --data cifar10=FOLDER \
        --weights mobilenet_v2=FILE --out DIR --jobs 2

DIR/runs.jsonl gets a line per finished run. After a stop or a kill at any moment the same command goes on. With
`--shard i/n` (n processes or machines, one folder) a shard writes runs-i-of-n.jsonl. `--report STEM` writes, from what
is finished, STEM.md, its figures, and STEM.jsonl, in place of running.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.plan import Plan, Run, read_plan
from benchmarks.accuracy.records import Records
from benchmarks.images import unpack
from sparse_bwd.training import UserError, open_source
from sparse_bwd.training.data import DataOptions


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        plan = read_plan(options.plan)
        if options.report:
            from benchmarks.accuracy.report import report

            print(report(plan, Records(options.out), options.report, options.times))
            return 0
        return run(plan, options)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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


def common_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """What every command about a plan takes."""
    found = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--plan", type=Path, required=True)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument(
        "--data", action="append", default=[], metavar="NAME=PLACE", help="folder or zip archive"
    )
    found.add_argument("--weights", action="append", default=[], metavar="MODEL=FILE")
    found.add_argument("--data-root", type=Path, default=Path("data"), help="of torchvision's data sets")
    found.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
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
        records = Records(options.out, name)
        grid = Grid(
            plan, runs, options.out, records, sources, weights, runtime, options.jobs, options.minutes
        )
        return 1 if grid.carry_out() else 0


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise UserError(f"--shard is '{text}'; it must be i/n with 1 <= i <= n, such as 2/8.")
    return int(number), int(of)


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UserError(f"{option} is '{text}'; it must be a name and a place, such as {option} NAME=PLACE.")
    return name, str(Path(place).resolve()) if Path(place).exists() else place


def find_weights(plan: Plan, options: argparse.Namespace) -> dict[str, str]:
    """Model -> what --weights gives for it."""
    weights = dict(_pair(text, "--weights") for text in options.weights)
    if unknown := sorted(set(weights) - set(plan.models)):
        raise UserError(f"The plan has no model {', '.join(unknown)}; it has {', '.join(plan.models)}.")
    return weights


def find_data(
    plan: Plan, runs: Sequence[Run], options: argparse.Namespace, download: bool = False
) -> dict[str, str]:
    """Where every data set of the runs is, opened once so that a missing one is said before the first run."""
    given = dict(_pair(text, "--data") for text in options.data)
    if unknown := sorted(set(given) - set(plan.data)):
        raise UserError(f"The plan has no data {', '.join(unknown)}; it has {', '.join(plan.data)}.")
    found = {}
    first = [plan.pretraining(model) for model in dict.fromkeys(run.group.model for run in runs)]
    for name in dict.fromkeys(run.group.data for run in (*first, *runs) if run is not None):
        entry = plan.data[name]
        place = given.get(name) or entry.get("source")
        if place is None:
            layout = entry.get(
                "layout", "one folder of images per class, or train/ and test/ with such folders"
            )
            raise UserError(
                f"The data set {name} is not given: --data {name}=FOLDER, where FOLDER has {layout}."
            )
        if Path(place).is_file():
            place = str(unpack(Path(place), options.out / "data" / name))
        open_source(place, DataOptions(options.data_root, download))
        found[name] = place
    return found


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
