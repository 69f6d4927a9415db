"""States of a velocity run of a plan, gone through again: the same data, recipe, seed and learning rate.

With the same threads and versions they are the same bits. In every state channels can be scored in other ways, too:

    velocity      |v|                    as the run's policy has just measured it
    gradient      |dL/dW_c|_2            on the probe and its labels (`sparse_bwd.selection.gradients`), in eval mode

A score per weight is divided by the weights of its channel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import sparse_bwd as sb
from benchmarks.accuracy.command import find_data, find_weights
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.plan import Plan, Run
from benchmarks.accuracy.records import Records
from sparse_bwd.selection.costs import CostTable
from sparse_bwd.selection.gradients import GradientMeter
from sparse_bwd.training import RunConfig, Runtime, UserError
from sparse_bwd.training.display import Display
from sparse_bwd.training.loop import Trainer
from sparse_bwd.training.prepare import make_policy, prepare


def first_budget(plan: Plan) -> str | None:
    """The budget of the plan's most valuable run."""
    return plan.runs()[0].budget


def runs_of(plan: Plan, method: str, budget: str | None, seeds: int | None = None) -> list[Run]:
    """Runs of one method and budget in the norms' mode of the first of them; `seeds`: the first so many of each cell.

    Seeds outermost. UserError if the plan has none.
    """
    found = [run for run in plan.runs() if run.group.method == method and run.budget == budget]
    found = [run for run in found if run.group.batch_norm == found[0].group.batch_norm]
    if not found:
        raise UserError(
            f"The plan has no run of '{method}' at the budget {budget}; see --method and --budget."
        )
    order = sorted({run.seed for run in found}, key=[run.seed for run in found].index)[:seeds]
    return [run for seed in order for run in found if run.seed == seed]


def configs_of(plan: Plan, runs: Sequence[Run], options: argparse.Namespace) -> dict[Run, RunConfig]:
    """The configurations that the grid in `options.out` has for runs. UserError if a learning rate is not known yet."""
    sources, weights = find_data(plan, runs, options), find_weights(plan, options)
    grid = Grid(plan, plan.runs(), options.out, Records(options.out), sources, weights, {})
    for run in runs:
        if grid.rate(run.group) is None:
            raise UserError(
                f"The learning rate of {run.group.name} is not known, as a trial is missing in {options.out}; run the "
                "plan first."
            )
    return {run: grid.job(run).config for run in runs}


class Replay:
    """A velocity run under a budget of weights that goes on epoch by epoch; at first before its first epoch."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        if config.policy != "velocity":
            raise UserError(f"The policy {config.policy} measures no velocity; name a --method that does.")
        labelled = prepare(replace(config, policy="gradient"), runtime)
        assert isinstance(labelled.policy, sb.GradientNormPolicy)
        self.meter: GradientMeter = labelled.policy.meter
        images, labels = self.meter.data
        policy = make_policy(labelled.model, config, images, labels)
        assert isinstance(policy, sb.VelocityPolicy)
        if policy.budget is None:
            raise UserError(f"The budget {config.budget} is not one of weights; give --budget one that is.")
        self.policy, self.budget = policy, policy.budget
        self.prepared = replace(labelled, config=config, policy=policy)
        self.trainer = Trainer(self.prepared)
        self.trainer.start()

    @property
    def table(self) -> CostTable:
        return self.policy.table

    @property
    def trained(self) -> Tensor:
        """Rows of the table that are trained from now on, bool."""
        marks = torch.zeros(len(self.table), dtype=torch.bool)
        assert self.policy.selection is not None
        parts = dict(zip(self.table.names, marks.split(self.table.sizes), strict=True))
        for name, channels in self.policy.selection.items():
            parts[name][slice(None) if channels.index is None else channels.index] = True
        return marks

    def advance(self, epochs: int = 1) -> None:
        """Trains so many epochs; after each of them but the run's last one velocity is measured and chooses."""
        with Display(0, 0, quiet=True) as display:
            self.trainer.run(display, until=self.trainer.epoch + epochs)

    def scores(self, orders: Sequence[str]) -> dict[str, Tensor]:
        """Name -> score of every row, for names of the module docstring, with " per weight" or without."""
        found = {}
        for order in orders:
            name, per_weight = order.removesuffix(" per weight"), order.endswith(" per weight")
            score = self.policy.velocity.value.abs() if name == "velocity" else self._gradient()
            found[order] = score / self.table.cost if per_weight else score
        return found

    def _gradient(self) -> Tensor:
        return self.meter.norms(self.prepared.model, self.table)
