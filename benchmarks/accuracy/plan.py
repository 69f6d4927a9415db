"""What is to be run. A plan is a JSON file; its format:

    version    2
    title      heading of the report;  about: its remarks, a list of sentences
    recipe     options of every run, as those of `sparse-bwd finetune` with underscores ("epochs": 5, "image_size": 96)
    data       name -> {"source": a torchvision data set, or null: given by --data NAME=FOLDER; "layout": how such a
               folder looks, where it is not one folder per class; "options": of runs on it}
    models     name -> {"options": of runs of it}; what to start from is "weights" there or --weights NAME=FILE, or what
               "pretraining": {"data", "batch_norm", "options"} makes before all runs of the model
    methods    name -> {"options": {"policy": ..., "axis": ...}, "tuned_at": budgets, "published": its row in the paper}
    budgets    name -> {"ours": what --budget takes, "scheme": of sparse-update} or, where it differs, {model: {...}};
               a budget that is not named here is what --budget takes; "first": "scheme" of a method is its scheme
    published  the table of the paper whose setting this is, if it is one (`published.py`)
    tuning     {"lr": [...], "validation": share of the training images, "seeds": [...], "budgets": [...]}: every rate
               is tried with every seed and budget; or {"lr": value} for one rate without trials
    compare    [[method, method], ...]: pairs whose difference the report tests
    grid       [{"data", "models", "methods", "budgets", "batch_norm", "seeds": lists}, ...], the most valuable first;
               a method without a budget has "budgets": [null]

Every combination of an entry is one run; one that an earlier entry has is not repeated. Runs that share data, model,
method and batch-norm mode are a *group*: they share the learning rate, and a shard has whole groups.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_bwd.training import RunConfig, UserError, configure

VERSION = 2
PRETRAINING = "pretraining"  # the method of a run that makes a model's weights
_LISTS = ("data", "models", "methods", "budgets", "batch_norm", "seeds")
_OPTIONAL = {"about", "budgets", "compare", "published"}
_KEYS = {"version", "title", "recipe", "data", "models", "methods", "tuning", "grid", *_OPTIONAL}


@dataclass(frozen=True)
class Group:
    """Runs that share a learning rate."""

    data: str
    model: str
    method: str
    batch_norm: str

    @property
    def name(self) -> str:
        """For people and folders."""
        return "-".join(asdict(self).values()).replace(" ", "-").replace(",", "")


@dataclass(frozen=True)
class Run:
    """One point of the grid; budget None: the method has none. lr: of a trial; None: what tuning found."""

    group: Group
    budget: str | None
    seed: int
    lr: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What tells this run from all others of a plan, trials of other rates included."""
        words = (*asdict(self.group).values(), self.budget or "", str(self.seed))
        return words if self.lr is None else (*words, repr(self.lr))

    @property
    def name(self) -> str:
        """For people and folders."""
        budget = f"-{self.budget.replace('/', 'of')}" if self.budget else ""
        trial = "" if self.lr is None else f"-trial{self.lr:g}"
        return f"{self.group.name}{budget}-seed{self.seed}{trial}".replace(" ", "-").replace("%", "pc")


@dataclass(frozen=True)
class Tuning:
    """Learning rates to try on images held back; without `validation` the one rate is used as it is."""

    lr: tuple[float, ...]
    validation: float = 0.0
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.lr) > 1 and not 0 < self.validation < 1:
            raise UserError(
                f"The plan tries {len(self.lr)} learning rates, but its validation share is {self.validation}; "
                "it must be above 0 and below 1, so that the test images stay unseen."
            )


@dataclass(frozen=True)
class Plan:
    """A plan that makes sense; the module docstring describes the fields."""

    title: str
    recipe: dict[str, Any]
    data: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    grid: list[dict[str, Any]]
    tuning: Tuning
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    compare: list[list[str]] = field(default_factory=list)
    published: int | None = None
    about: list[str] = field(default_factory=list)

    def runs(self) -> list[Run]:
        """The grid, in the order of value, without repetitions."""
        found: dict[Run, None] = {}
        for entry in self.grid:
            # Seeds outermost: what a cut entry leaves is every cell with fewer seeds.
            for seed, budget, data, model, mode, method in itertools.product(
                *(entry[key] for key in ("seeds", "budgets", "data", "models", "batch_norm", "methods"))
            ):
                found.setdefault(Run(Group(data, model, method, mode), budget, seed))
        return list(found)

    def shard(self, number: int, of: int) -> list[Run]:
        """The runs of every `of`-th group, from the `number`-th (1 .. of)."""
        runs = self.runs()
        groups = list(dict.fromkeys(run.group for run in runs))
        mine = set(groups[number - 1 :: of])
        return [run for run in runs if run.group in mine]

    def trials(self, group: Group, runs: Sequence[Run]) -> list[Run]:
        """The runs that find the learning rate of `group`, at its tuning budgets; none if there is but one rate."""
        if len(self.tuning.lr) == 1:
            return []
        has_budget = any(run.budget is not None for run in runs if run.group == group)
        at = self.methods[group.method].get("tuned_at", self.tuning.budgets) if has_budget else [None]
        every = itertools.product(self.tuning.seeds, at, self.tuning.lr)
        return [Run(group, budget, seed, lr) for seed, budget, lr in every]

    def pretraining(self, model: str) -> Run | None:
        """The run that makes the weights of a model; None if they are given."""
        entry = self.models[model].get(PRETRAINING)
        return (
            None
            if entry is None
            else Run(Group(entry["data"], model, PRETRAINING, entry["batch_norm"]), None, 0)
        )

    def options(self, run: Run) -> dict[str, Any]:
        """Options of `sparse-bwd finetune` for a run, without data, weights and learning rate."""
        group = run.group
        if group.method == PRETRAINING:
            own = self.models[group.model][PRETRAINING]["options"]
            return {"policy": "full", **own, "batch_norm": group.batch_norm, "seed": run.seed}
        options = dict(self.recipe)
        options |= self.data[group.data].get("options", {})
        options |= self.models[group.model].get("options", {})
        options |= self.methods[group.method]["options"]
        if run.budget is not None:
            options |= self._spend(run, options)
        return {**options, "batch_norm": group.batch_norm, "seed": run.seed}

    def spends(self, budget: str, model: str) -> dict[str, str]:
        """What a budget of the plan is for a model: "ours" and "scheme", as far as it has them."""
        entry = self.budgets.get(budget, {"ours": budget})
        found: dict[str, str] = entry.get(model, entry)
        return found

    def _spend(self, run: Run, options: Mapping[str, Any]) -> dict[str, str]:
        """The budget of a run in the words of its policy."""
        assert run.budget is not None
        entry = self.spends(run.budget, run.group.model)
        by_scheme = options["policy"] == "sparse-update"
        needed = {"scheme"} if by_scheme else {"ours"}
        if options.get("first") == "scheme":
            needed.add("scheme")
        if missing := sorted(needed - set(entry)):
            raise UserError(
                f"The plan's budget '{run.budget}' has no {missing[0]} for {run.group.model}, which the method "
                f"'{run.group.method}' needs."
            )
        spent = {"scheme": str(entry["scheme"])} if by_scheme else {"budget": str(entry["ours"])}
        return {**spent, "first": str(entry["scheme"])} if options.get("first") == "scheme" else spent

    def config(
        self, run: Run, sources: Mapping[str, str], weights: Mapping[str, str], lr: float
    ) -> RunConfig:
        """The whole configuration of a run; `lr` is not that of pretraining. UserError for what makes no sense."""
        options = self.options(run)
        base = RunConfig(run.group.model, sources[run.group.data])
        if run.group.method == PRETRAINING:
            return configure(base, options)
        held = {"validation": self.tuning.validation} if run.lr is not None else {}
        start = weights.get(run.group.model) or options.get("weights", "none")
        return configure(base, {**options, **held, "weights": start, "lr": lr})


def read_plan(path: Path) -> Plan:
    """The plan in a file. UserError, in a sentence, for what is not one or refers to what it does not define."""
    try:
        words = json.loads(path.read_text())
        if words.get("version") != VERSION:
            raise UserError(
                f"The plan {path} has version {words.get('version')}; this runner reads {VERSION}."
            )
        if unknown := sorted(set(words) - _KEYS):
            raise UserError(
                f"The plan {path} has the unknown fields {', '.join(unknown)}; see benchmarks/accuracy/plan.py."
            )
        tuning = _tuning(**words["tuning"])
        plan = Plan(**{k: v for k, v in words.items() if k not in ("version", "tuning")}, tuning=tuning)
        _check(plan)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The plan {path} cannot be read: {type(error).__name__}: {error}.") from error
    return plan


def _tuning(lr: Any, seeds: Sequence[int] = (0,), budgets: Sequence[str] = (), **rest: Any) -> Tuning:
    rates = tuple(float(rate) for rate in (lr if isinstance(lr, list) else [lr]))
    return Tuning(lr=rates, seeds=tuple(seeds), budgets=tuple(budgets), **rest)


def _check(plan: Plan) -> None:
    """Every name in the grid is defined, and every run has a configuration."""
    for number, entry in enumerate(plan.grid, 1):
        if missing := [key for key in _LISTS if not isinstance(entry.get(key), list) or not entry[key]]:
            raise UserError(
                f"Entry {number} of the plan's grid needs a list that is not empty for: {', '.join(missing)}."
            )
        for key in ("data", "models", "methods"):
            if absent := sorted(set(entry[key]) - set(getattr(plan, key))):
                raise UserError(
                    f"Entry {number} of the plan's grid names {key} that the plan does not define: {', '.join(absent)}."
                )
    if absent := sorted({method for pair in plan.compare for method in pair} - set(plan.methods)):
        raise UserError(f"The plan compares methods that it does not define: {', '.join(absent)}.")
    runs = plan.runs()
    places = {name: name for name in plan.data}
    for model, entry in plan.models.items():
        if PRETRAINING in entry and entry[PRETRAINING]["data"] not in plan.data:
            raise UserError(f"The pretraining of {model} names data that the plan does not define.")
    first = [run for model in plan.models if (run := plan.pretraining(model)) is not None]
    for run in (*first, *runs, *_all_trials(plan, runs)):
        plan.config(run, places, {}, run.lr or plan.tuning.lr[0])


def _all_trials(plan: Plan, runs: Sequence[Run]) -> Iterator[Run]:
    for group in dict.fromkeys(run.group for run in runs):
        yield from plan.trials(group, runs)
