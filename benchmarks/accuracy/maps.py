"""What the policies selected in finished runs: where, how much two selections share, and what the channels respond to.

    python -m benchmarks.accuracy.maps --plan benchmarks/plans/small.json --data signs=signs.zip \\
        --data cifar10=FOLDER --weights mobilenet_v2=FILE --out DIR --report benchmarks/results/accuracy/maps

From the runs of one budget in DIR, which is only read: every epoch's channels, from the logs; the trained networks, for
the classes that the channels of --method respond to. For the gradient norm those runs are made again and both orders
taken in the very same states; STEM.jsonl gets a line per state, so that the same command goes on after a stop and
need not repeat it when DIR has more runs. Writes STEM.md, STEM.json and figures from what is finished.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.chosen import Chosen, Weights, read_chosen
from benchmarks.accuracy.command import common_parser, guarded
from benchmarks.accuracy.plan import Plan, Run, read_plan
from benchmarks.accuracy.records import Records, append_line, read_lines
from benchmarks.accuracy.responding import Responses, averaged, class_responses
from benchmarks.accuracy.states import Replay, configs_of, first_budget, runs_of
from sparse_bwd.files import write_json
from sparse_bwd.measure.machine import commit
from sparse_bwd.selection.costs import greedy_prefix
from sparse_bwd.selection.selection import Selection
from sparse_bwd.training import RunConfig, Runtime, UserError, load_run
from sparse_bwd.training.loader import in_order
from sparse_bwd.training.prepare import open_data
from sparse_bwd.training.selected import decode, encode

GRADIENT = "gradient norm"
_STATE = ("data", "model", "method", "budget", "batch_norm", "seed", "lr", "epoch")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """Everything about one data set and model. `states`: lines of STEM.jsonl; `responses`: None without --method."""

    data: str
    model: str
    weights: Weights
    methods: dict[str, list[Chosen]]  # in the order of the plan
    classes: list[str]
    responses: Responses | None
    states: Sequence[Record] = ()


def finished(
    plan: Plan, records: Records, budget: str | None, mode: str
) -> dict[tuple[str, str], dict[str, list[tuple[Run, Record]]]]:
    """(data, model) -> method -> its runs at a budget that came to an end."""
    found: dict[tuple[str, str], dict[str, list[tuple[Run, Record]]]] = {}
    for run in plan.runs():
        record = records.get(run)
        wanted = (run.budget, run.group.batch_norm) == (budget, mode)
        if wanted and record is not None and record["accuracy"] is not None:
            methods = found.setdefault((run.group.data, run.group.model), {})
            methods.setdefault(run.group.method, []).append((run, record))
    return found


def collect(plan: Plan, options: argparse.Namespace) -> list[Found]:
    """Reads, and measures what is not known yet. UserError if no run of the budget is finished."""
    budget = options.budget or first_budget(plan)
    records, states = Records(options.out), options.report.with_suffix(".jsonl")
    asked = runs_of(plan, options.method, budget, options.seeds)
    groups = finished(plan, records, budget, asked[0].group.batch_norm)
    if not groups:
        raise UserError(f"No run of this plan at the budget {budget} is finished in {options.out}.")
    configs = configs_of(plan, asked, options)
    found = []
    for (data, model), methods in groups.items():
        mine = [pair for pair in methods.get(options.method, []) if pair[0] in asked]
        for run, record in mine:
            remake(run, record, configs[run], options, states)
        any_run = next(iter(methods.values()))[0]
        plain = load_run(_folder(options, any_run[1]), model)
        chosen = {method: read_chosen(options.out, runs) for method, runs in methods.items()}
        asked_for = {(run.group.data, run.group.model, run.seed, configs[run].recipe.lr) for run, _ in mine}
        lines = [
            line
            for line in read_lines(states, state_key)
            if (line["data"], line["model"], line["seed"], line["lr"]) in asked_for
        ]
        network, names = Weights(plain.model), plain.classes
        responses = _responses(mine, list(network.layers), configs, options) if mine else None
        found.append(Found(data, model, network, chosen, names, responses, lines))
    return found


def _folder(options: argparse.Namespace, record: Record) -> Path:
    path: Path = options.out / record["selection"]
    return path.parent


def _responses(
    runs: Sequence[tuple[Run, Record]],
    names: Sequence[str],
    configs: Mapping[Run, RunConfig],
    options: argparse.Namespace,
) -> Responses:
    """m and eta2, means over the trained networks of the runs."""
    found = []
    for run, record in runs:
        ended = load_run(_folder(options, record), run.group.model)
        test = open_data(configs[run], Runtime(options.out, data_root=options.data_root)).test
        batches = in_order(test, ended.preprocessing.evaluation(), 64)
        found.append(class_responses(ended.model, names, batches, ended.preprocessing, len(ended.classes)))
    return averaged(found)


def state_key(line: Record) -> tuple[Any, ...]:
    """What tells a state from all others."""
    return tuple(line[name] for name in _STATE)


def remake(run: Run, record: Record, config: RunConfig, options: argparse.Namespace, states: Path) -> None:
    """Makes a run again, unless its states are known; a line per epoch whose channels velocity chose.

    A line has both selections in the state before that epoch, the rank correlation of both scores per weight, and
    whether the run in DIR trained the same channels.
    """
    from scipy import stats

    about = {
        "data": run.group.data, "model": run.group.model, "method": run.group.method, "budget": run.budget,
        "batch_norm": run.group.batch_norm, "seed": run.seed, "lr": config.recipe.lr,
    }  # fmt: skip
    done = {state_key(line) for line in read_lines(states, state_key)}
    epochs = range(2, config.recipe.epochs + 1)
    if all(state_key({**about, "epoch": epoch}) in done for epoch in epochs):
        return
    (logged,) = read_chosen(options.out, [(run, record)])
    with tempfile.TemporaryDirectory() as folder:
        runtime = Runtime(
            Path(folder), threads=options.threads, data_root=options.data_root, quiet=True, measure=False
        )
        replay = Replay(config, runtime)
        for epoch in epochs:
            replay.advance()
            if state_key({**about, "epoch": epoch}) in done:
                continue
            line = {**about, "epoch": epoch, **_both(replay, stats.spearmanr)}
            line["as_logged"] = all(
                torch.equal(decode(line["velocity"][name], len(mask)), mask)
                if name in line["velocity"]
                else not mask.any()
                for name, mask in logged.epochs[epoch - 1].items()
            )
            append_line(states, {**line, "commit": commit(Path(__file__).parent)})
            print(f"{run.name}: epoch {epoch}", file=sys.stderr, flush=True)
        replay.trainer.log.close()


def _both(replay: Replay, spearman: Any) -> dict[str, Any]:
    """Velocity's selection and the gradient norm's under the same budget."""
    table = replay.table
    scores = replay.scores(("velocity per weight", "gradient per weight"))
    by_gradient = table.selection(greedy_prefix(scores["gradient per weight"], table.cost, replay.budget))
    chosen = replay.policy.selection
    assert isinstance(chosen, Selection)
    return {
        "axis": table.axis, "sizes": table.channels, "velocity": encode(chosen, table.channels),
        "gradient": encode(by_gradient, table.channels),
        "rank_correlation": float(spearman(*(score.numpy() for score in scores.values())).statistic),
    }  # fmt: skip


def masks(line: Record, which: str) -> dict[str, Tensor]:
    """One of the two selections of a line of STEM.jsonl."""
    return {
        name: decode(line[which][name], size) if name in line[which] else torch.zeros(size, dtype=torch.bool)
        for name, size in line["sizes"].items()
    }


def parser() -> argparse.ArgumentParser:
    found = common_parser("python -m benchmarks.accuracy.maps", __doc__)
    found.add_argument("--report", type=Path, metavar="STEM", required=True)
    found.add_argument("--method", default="velocity", help="whose states and responses are looked into")
    found.add_argument("--budget", help="of all runs; default: that of the plan's first run")
    found.add_argument(
        "--seeds", type=int, default=3, help="at most so many states and networks of each data set"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return guarded(lambda: write(options))


def write(options: argparse.Namespace) -> int:
    """Measures what is missing and writes the report."""
    from benchmarks.accuracy.maps_page import summarise, write_page

    plan = read_plan(options.plan)
    options.report.parent.mkdir(parents=True, exist_ok=True)
    found = collect(plan, options)
    summary = summarise(found, options.method)
    write_json(options.report.with_suffix(".json"), summary)
    print(write_page(plan, summary, options.report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
