"""What all commands about a plan share: their options, where data and weights are, and errors as sentences."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.accuracy.plan import Plan, Run
from benchmarks.images import unpack
from sparse_bwd.training import UserError, open_source
from sparse_bwd.training.data import DataOptions


def guarded(call: Callable[[], int]) -> int:
    """The exit code of `call`; 2, with the sentence on stderr, if the user's input was at fault."""
    try:
        return call()
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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


def find_weights(plan: Plan, options: argparse.Namespace) -> dict[str, str]:
    """Model -> what --weights gives for it."""
    weights = dict(_pair(text, "--weights") for text in options.weights)
    if unknown := sorted(set(weights) - set(plan.models)):
        raise UserError(f"The plan has no model {', '.join(unknown)}; it has {', '.join(plan.models)}.")
    return weights


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UserError(f"{option} is '{text}'; it must be a name and a place, such as {option} NAME=PLACE.")
    return name, str(Path(place).resolve()) if Path(place).exists() else place
