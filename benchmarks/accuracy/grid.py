"""All runs of a plan, in the order of their value, by several processes; what is finished is never done again.

A run starts when the weights of its model are there and the learning rate of its group is known; pretraining and the
trials come right before the first run that needs them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.one import Job
from benchmarks.accuracy.plan import Group, Plan, Run
from benchmarks.accuracy.records import Records
from benchmarks.accuracy.tuning import best_rate, mean_accuracies
from benchmarks.accuracy.workers import Workers
from sparse_bwd.training import UserError
from sparse_bwd.training.finish import MODEL


@dataclass
class Grid:
    """The runs of one shard.

    sources: data name -> what to open; weights: model name -> file or torchvision name; runtime: of every run, see
    `sparse_bwd.training.Runtime`. jobs: processes. minutes: after these, running jobs leave a checkpoint and it ends.
    """

    plan: Plan
    runs: Sequence[Run]
    folder: Path
    records: Records
    sources: Mapping[str, str]
    weights: Mapping[str, str]
    runtime: dict[str, Any]
    jobs: int = 1
    minutes: float | None = None
    trials: dict[Group, list[Run]] = field(init=False)
    pretraining: dict[str, Run] = field(init=False)
    started: set[Run] = field(default_factory=set)

    def __post_init__(self) -> None:
        groups = dict.fromkeys(run.group for run in self.runs)
        self.trials = {group: self.plan.trials(group, self.runs) for group in groups}
        models = dict.fromkeys(group.model for group in groups)
        found = {model: self.plan.pretraining(model) for model in models if model not in self.weights}
        self.pretraining = {model: run for model, run in found.items() if run is not None}

    @property
    def all(self) -> list[Run]:
        """Pretraining, trials and runs."""
        return [
            *self.pretraining.values(),
            *(trial for trials in self.trials.values() for trial in trials),
            *self.runs,
        ]

    def rate(self, group: Group) -> float | None:
        """The learning rate of a group; None while a trial is missing."""
        if not self.trials[group]:
            return self.plan.tuning.lr[0]
        found = [self.records.get(trial) for trial in self.trials[group]]
        if None in found:
            return None
        means = mean_accuracies(record for record in found if record is not None)
        return best_rate(means)

    def done(self, run: Run) -> bool:
        """Whether a run is finished, at the learning rate that its group has now: trials may have been added since."""
        record = self.records.get(run)
        if record is None or run.lr is not None or run in self.pretraining.values():
            return record is not None
        return bool(record["lr"] == self.rate(run.group))

    def next(self) -> Run | None:
        """The most valuable run that can start now; None if all have, or wait for trials that are running."""
        for run in self.runs:
            if run in self.started or self.done(run):
                continue
            before = self.pretraining.get(run.group.model)
            if before is not None and not self.done(before):
                if before not in self.started:
                    return before
                continue
            if self.rate(run.group) is not None:
                return run
            for trial in self.trials[run.group]:
                if trial not in self.started and not self.done(trial):
                    return trial
        return None

    def job(self, run: Run) -> Job:
        """What a worker needs for a run."""
        if run in self.pretraining.values():
            return Job(run, self.plan.config(run, self.sources, {}, 0.0), self.folder, self.runtime)
        made = {model: str(self.job(first).out / MODEL) for model, first in self.pretraining.items()}
        lr = run.lr if run.lr is not None else self.rate(run.group)
        assert lr is not None
        config = self.plan.config(run, self.sources, {**self.weights, **made}, lr)
        return Job(run, config, self.folder, self.runtime)

    def carry_out(self) -> list[str]:
        """Runs what is missing; returns what went wrong, one sentence per run."""
        troubles: list[str] = []
        workers = Workers(self.jobs)
        missing = [run for run in self.all if not self.done(run)]
        end = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        with (
            _stopping(workers),
            tqdm(total=len(self.all), initial=len(self.all) - len(missing), unit="run") as bar,
        ):
            while True:
                self._feed(workers)
                if not workers.busy:
                    return troubles
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise KeyboardInterrupt
                for worker in workers.wait(left):
                    assert worker.job is not None
                    name = worker.job.run.name
                    try:
                        record = worker.take()
                    except RuntimeError as error:
                        troubles.append(str(error))
                        bar.write(str(error))
                        continue
                    if record is not None:
                        self.records.add(record)
                        bar.update()
                        bar.write(_line(name, record))

    def _feed(self, workers: Workers) -> None:
        for worker in workers.idle:
            run = self.next()
            if run is None:
                return
            self.started.add(run)
            worker.give(self.job(run))


def _line(name: str, record: Mapping[str, Any]) -> str:
    if record["accuracy"] is None:
        return f"{name}: {record['failed']}: {record['error']}"
    return f"{name}: {record['accuracy']:.1%}"


@contextmanager
def _stopping(workers: Workers) -> Iterator[None]:
    """Ctrl-C, SIGTERM and the end of the time: every running job leaves a checkpoint first, then the runner ends."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        workers.stop()
        raise UserError("Stopped; run the same command again to go on.") from None
    finally:
        signal.signal(signal.SIGTERM, before)
