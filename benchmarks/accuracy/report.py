"""The page of a grid: STEM.md with its figures beside it, and what they are made from: STEM.jsonl, the runs, and
STEM-trials.jsonl."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import epochs, figures, published, tables
from benchmarks.accuracy.cells import Cell, cells
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.plan import Plan
from benchmarks.accuracy.records import Records
from benchmarks.accuracy.significance import compare
from benchmarks.accuracy.tuning import mean_accuracies
from sparse_bwd.files import write_text
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.training import UserError

Times = Mapping[tuple[str | None, ...], Mapping[str, Any]]


def report(plan: Plan, records: Records, stem: Path, times: Path | None = None) -> str:
    """Writes everything; returns the page. UserError if not one run of the plan is finished.

    times: what `benchmarks.accuracy.choosing` wrote of this plan; None: the times of the runs themselves, which had
    company on the machine.
    """
    grid = Grid(plan, plan.runs(), records.path.parent, records, {}, {}, {})
    runs = [record for run in grid.runs if grid.done(run) and (record := records.get(run)) is not None]
    if not runs:
        raise UserError(f"No run of this plan is finished in {records.path.parent}; run it first.")
    stem.parent.mkdir(parents=True, exist_ok=True)
    tried = [trial for trials in grid.trials.values() for trial in trials]
    trials = [record for trial in tried if (record := records.get(trial)) is not None]
    for path, lines in (
        (stem.with_suffix(".jsonl"), runs),
        (stem.with_name(f"{stem.name}-trials.jsonl"), trials),
    ):
        if lines:
            write_text(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    text = page(plan, runs, trials, stem, read_times(times) if times else None)
    write_text(stem.with_suffix(".md"), text)
    return text


def page(
    plan: Plan,
    runs: Sequence[Mapping[str, Any]],
    trials: Sequence[Mapping[str, Any]],
    stem: Path,
    times: Times | None = None,
) -> str:
    """The page as Markdown; draws its figures."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells(runs):
        groups.setdefault((cell.model, cell.batch_norm), []).append(cell)
    parts = [f"# {plan.title}", "\n".join(f"- {text}" for text in plan.about), _state(plan, runs)]
    for (model, mode), members in groups.items():
        name = f"{stem.name}-{model}-{mode}".replace(":", "-")
        parts += [f"## {model}, norms in mode '{mode}'", tables.accuracy_table(members)]
        parts += [f"![{label}]({figure})" for label, figure in _figures(members, stem.parent, name, times)]
        parts += [published.beside(plan, members), tables.cost_table(members)]
        if every := epochs.followed(members):
            figure = epochs.draw(every, stem.parent / f"{name}-epochs.png")
            parts += ["### Over the epochs", f"![Accuracy over the epochs]({figure})", epochs.table(every)]
    if plan.compare:
        parts += ["## Differences", _pairs(), tables.comparison_table(compare(runs, plan.compare))]
    if trials:
        parts += [
            "## Learning rates",
            "Accuracy on held-back images, mean of the trials; the best is used.",
            _rates(trials),
        ]
    parts += [_troubles(runs), _origin(runs, times)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _state(plan: Plan, runs: Sequence[Mapping[str, Any]]) -> str:
    asked = len(plan.runs())
    cut = (
        ""
        if len(runs) == asked
        else f" of the {asked} of the plan, the most valuable first; the rest was not run"
    )
    words = "Accuracy: mean ± standard deviation over the seeds, in percent; bold: best of its budget"
    return f"{len(runs)} runs{cut}. {words}."


def _figures(members: Sequence[Cell], folder: Path, name: str, times: Times | None) -> list[tuple[str, str]]:
    """Against weights (those with such a budget), memory and time."""
    by_weights = [cell for cell in members if not (cell.budget or "").endswith("B")]
    timed = [cell for cell in members if times is None or time_key(cell) in times]
    asked: list[tuple[str, str, Sequence[Cell], figures.Place, bool]] = [
        (
            "weights",
            "weights trained, thousands",
            by_weights,
            lambda c: c.mean("trained_weights") / 1e3,
            False,
        ),
        ("memory", "memory of training (MiB)", members, lambda c: c.training_mib, True),
        ("time", "time of training (s)", timed, lambda c: training_seconds(c, times), True),
    ]
    found = []
    for what, label, shown, place, front in asked:
        if (
            len({(cell.method, cell.budget) for cell in shown if cell.runs}) > 1
        ):  # a lone point compares nothing
            path = folder / f"{name}-{what}.png"
            found.append((f"Accuracy against {label}", figures.draw(shown, place, label, path, front)))
    return found


def read_times(path: Path) -> Times:
    """The rows of a file of `benchmarks.accuracy.choosing`, by what they are of."""
    rows = json.loads(path.read_text())["rows"]
    return {(row["model"], row["method"], row["batch_norm"], row["budget"]): row for row in rows}


def time_key(cell: Cell) -> tuple[str | None, ...]:
    """Of a cell in `read_times`."""
    return cell.model, cell.method, cell.batch_norm, cell.budget


def training_seconds(cell: Cell, times: Times | None = None) -> float:
    """Mean over the seeds: median step times the steps, and all selections; without loading and testing."""
    if times is None:
        seconds = [run["steps"] * run["ms_per_step"] / 1000 + run["choosing_seconds"] for run in cell.runs]
        return statistics.fmean(seconds)
    found = times[time_key(cell)]
    steps, epochs = cell.mean("steps"), cell.mean("epochs")
    return float(
        found["first_seconds"] + (epochs - 1) * found["later_seconds"] + steps * found["step_seconds"]
    )


def _pairs() -> str:
    return (
        "Pairs share images, budget and seed. p: two-sided sign-flip test of the pairs, corrected after Holm over all "
        "rows; pairs of one data set share their test images, so that p speaks of these data sets alone."
    )


def _rates(trials: Sequence[Mapping[str, Any]]) -> str:
    methods: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    several = len({trial["model"] for trial in trials}) > 1
    for trial in trials:
        name = f"{trial['method']} ({trial['batch_norm']})" + (f", {trial['model']}" if several else "")
        methods.setdefault(name, {}).setdefault(trial["data"], []).append(trial)
    return tables.rate_table(
        [(name, {d: mean_accuracies(t) for d, t in found.items()}) for name, found in methods.items()]
    )


def _troubles(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in runs:
        name = f"{run['method']}, {run['budget']}, {run['data']}, seed {run['seed']}"
        if run["accuracy"] is None:
            lines.append(f"- {name}: {run['failed']}: {run['error']}")
        lines += [f"- {name}: warning: {text}" for text in run.get("warnings", [])]
    return "\n".join(["## Runs that went wrong", "", *(lines or ["None."])])


def _origin(runs: Sequence[Mapping[str, Any]], times: Times | None) -> str:
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    versions = ", ".join(f"{name} {value}" for name, value in runs[-1]["versions"].items())
    threads = ", ".join(sorted({str(run["threads"]) for run in runs if "threads" in run}))
    clock = (
        "the runs' own, several at a time, so that they are upper estimates"
        if times is None
        else "of interleaved steps and selections in one process (`benchmarks.accuracy.choosing`)"
    )
    return (
        f"Runs made at commit {commits}; {threads} CPU thread(s) each; {versions}. Times: {clock}. Reported at "
        f"{commit(Path(__file__).parent)} on {machine()['processor']} by `{command_line('benchmarks.accuracy')}`."
    )
