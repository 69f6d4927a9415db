"""What choosing costs: seconds and bytes of a policy's steps, beside those of the training between them.

    python -m benchmarks.accuracy.choosing --plan benchmarks/plans/choosing.json --data signs=signs.zip \
        --weights mobilenet_v2=FILE --out DIR --report benchmarks/results/accuracy/choosing

Every case of the plan (the first seed and data set of each) is prepared as a run of it, in one process; then training
steps and steps of the policies take turns. Writes STEM.json, which `--times` of the grid's report takes, and STEM.md.
Nothing else should run on the machine.

    share = (first + (epochs - 1) later) / (the same + epochs x steps x step)
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_bwd as sb
from benchmarks.accuracy.cells import MIB
from benchmarks.accuracy.command import common_parser, find_data, find_weights, guarded
from benchmarks.accuracy.plan import Plan, Run, read_plan
from benchmarks.accuracy.tables import row
from sparse_bwd.files import write_json, write_text
from sparse_bwd.measure.machine import command_line, commit, machine
from sparse_bwd.measure.meter import Meter, quantiles
from sparse_bwd.memory.scratch import largest_measured
from sparse_bwd.training import RunConfig, Runtime, UserError
from sparse_bwd.training.optimizer import make_optimizer
from sparse_bwd.training.prepare import Prepared, prepare

STEPS = 3  # of training between two steps of a policy: velocity then measures a change
ROUNDS = 7


@dataclass
class Case:
    """A run of the plan that can take one step at a time."""

    run: Run
    prepared: Prepared
    first_seconds: float = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    batch: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        model, config = self.prepared.model, self.prepared.config
        model.train()
        began = time.perf_counter()
        self.prepared.policy.step()
        self.first_seconds = time.perf_counter() - began
        self.optimizer = make_optimizer(config.recipe, model, lr=0.1 * config.recipe.lr)
        images, targets = next(iter(self.prepared.loader.epoch(0)))
        inputs = config.preprocessing.normalise(images)
        if config.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        self.batch = (inputs, targets)

    def train(self) -> None:
        """STEPS optimizer steps on one batch."""
        inputs, targets = self.batch
        for _ in range(STEPS):
            F.cross_entropy(self.prepared.model(inputs), targets).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def choose(self) -> None:
        """One step of the policy."""
        self.prepared.policy.step(self.optimizer)

    def _most_bytes(self) -> int:
        """Above what was alive before a step of the policy.

        A prediction runs operators that are new to it, one at a time, under the recorder of allocations, which cannot
        be on twice. So what a choice needs is run first, then the same choice is made again and recorded.
        """
        policy, before = self.prepared.policy, self.prepared.policy.selection
        assert before is not None
        state = copy.deepcopy(policy.state_dict())
        self.choose()
        policy.load_state_dict(state)
        sb.apply(self.prepared.model, before, self.optimizer)
        again = sb.memory.peak_bytes(self.choose, "cpu").peak
        predicts = getattr(policy, "limits", None) is not None
        return max(again, largest_measured()) if predicts else again

    def describe(self, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Times from interleaved rounds, and the bytes of one more step of the policy."""
        self.train()
        peak = self._most_bytes()
        config, loader = self.prepared.config, self.prepared.loader
        step = quantiles([ms / STEPS for ms in samples["train"]])[1] / 1000
        later = quantiles(list(samples["choose"]))[1] / 1000
        epochs, steps = config.recipe.epochs, loader.batches_per_epoch
        choosing = self.first_seconds + (epochs - 1) * later
        report = self.prepared.policy.report
        assert report is not None
        return {
            "method": self.run.group.method, "budget": self.run.budget, "data": self.run.group.data,
            "model": self.run.group.model, "batch_norm": self.run.group.batch_norm,
            "step_seconds": step, "first_seconds": self.first_seconds,
            "later_seconds": later, "later_samples_ms": list(samples["choose"]), "epochs": epochs, "steps": steps,
            "choosing_seconds": choosing, "share": choosing / (choosing + epochs * steps * step),
            "held_bytes": self.prepared.policy.velocity_bytes, "peak_bytes": peak, "trained_weights": report.cost,
        }  # fmt: skip


def cases_of(plan: Plan) -> list[Run]:
    """The first run of every model, method, batch-norm mode and budget: seeds and data sets take the same time."""
    found: dict[tuple[str | None, ...], Run] = {}
    for run in plan.runs():
        found.setdefault((run.group.model, run.group.method, run.group.batch_norm, run.budget), run)
    return list(found.values())


def measure(configs: Mapping[Run, RunConfig], runtime: Runtime, rounds: int) -> list[dict[str, Any]]:
    """One row per run; all cases are alive at the same time, so that they can take turns."""
    cases = []
    for run, config in configs.items():
        try:
            cases.append(Case(run, prepare(config, runtime)))
        except (UserError, ValueError) as error:
            raise UserError(f"The case '{run.group.method}' cannot start: {error}") from error
    taken = Meter(rounds).samples(
        {case.run.name: {"train": case.train, "choose": case.choose} for case in cases}
    )
    return [case.describe(taken[case.run.name]) for case in cases]


def page(record: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    head = ["method", "budget", "first choice, s", "later ones, s", "in steps of training", "of all training",
            "held, MiB", "at most while choosing, MiB"]  # fmt: skip
    lines = [row(head), row(["---", "---", *("--:" for _ in head[2:])])]
    for case in record["rows"]:
        lines.append(
            row(
                [
                    case["method"], case["budget"] or "none", f"{case['first_seconds']:.3f}",
                    f"{case['later_seconds']:.3f}", f"{case['later_seconds'] / case['step_seconds']:.1f}",
                    f"{case['share']:.1%}", f"{case['held_bytes'] / MIB:.2f}", f"{case['peak_bytes'] / MIB:.1f}",
                ]
            )
        )  # fmt: skip
    first = record["rows"][0]
    about = (
        f"{first['epochs']} epochs of {first['steps']} steps. Later ones: median over {record['rounds']} interleaved "
        "rounds; the first one also makes what the policy keeps. All of a step of the policy counts: measuring, "
        "choosing, predicting under a budget of bytes, applying the selection and moving the optimizer's state. At "
        "most while choosing: above what was alive before; under a budget of bytes the largest operator that was run "
        "to predict, with its operands, of all rows in this process, where that is more."
    )
    where = record["machine"]
    origin = (
        f"{where['processor']}, threads {where['threads']}, torch {where['versions']['torch']}, commit "
        f"{record['commit']}:\n\n```\n{record['command']}\n```"
    )
    return "\n\n".join([f"# {record['title']}", "\n".join(lines), about, *record["remarks"], origin]) + "\n"


def main() -> int:
    parser = common_parser("python -m benchmarks.accuracy.choosing", __doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--report", type=Path, required=True, metavar="STEM")
    options = parser.parse_args()
    return guarded(lambda: write(options))


def write(options: argparse.Namespace) -> int:
    """Measures and writes both files."""
    plan, stem = read_plan(options.plan), options.report
    for folder in (options.out, stem.parent):
        folder.mkdir(parents=True, exist_ok=True)
    runs = cases_of(plan)
    sources, weights = find_data(plan, runs, options), find_weights(plan, options)
    configs = {run: plan.config(run, sources, weights, plan.tuning.lr[0]) for run in runs}
    runtime = Runtime(options.out, threads=options.threads, data_root=options.data_root, quiet=True)
    rows = measure(configs, runtime, options.rounds)
    record = {
        "version": 1, "title": plan.title, "remarks": plan.about, "rounds": options.rounds, "rows": rows,
        "machine": machine(), "commit": commit(Path(__file__).parent),
        "command": command_line("benchmarks.accuracy.choosing"),
    }  # fmt: skip
    write_json(stem.with_suffix(".json"), record)
    write_text(stem.with_suffix(".md"), page(record))
    print(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
