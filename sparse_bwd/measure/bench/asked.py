"""What a benchmark is asked for, in words, and the cases that follow from it. Nothing here does any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sparse_bwd.measure.training_step import DTYPES
from sparse_bwd.memory.predict import OPTIMIZERS
from sparse_bwd.training.config import AXES, parse_budget
from sparse_bwd.training.devices import check_present, measurable
from sparse_bwd.training.errors import UserError, unknown
from sparse_bwd.training.recipe import BATCH_NORM

LAYOUTS = ("nchw", "channels_last")
POLICIES = ("velocity", "random", "sparse-update")
NOTHING, EVERYTHING = "0", "1"


@dataclass(frozen=True)
class Asked:
    """The network and how it is trained; the same for every case.

    Attributes:
        layout: of everything but dense, which takes the faster one; "" for the faster one of dense.
        rounds: of interleaved steps that are timed.
        seed: of the weights, the batch and what policies draw.
    """

    model: str
    batch: int = 16
    size: int = 128
    classes: int = 1000
    device: str = "cpu"
    dtype: str = "fp32"
    optimizer: str = "sgd_momentum"
    batch_norm: str = "frozen"
    layout: str = "channels_last"
    rounds: int = 15
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, word, known in (
            ("dtype", self.dtype, tuple(DTYPES)),
            ("optimizer", self.optimizer, tuple(OPTIMIZERS)),
            ("batch-norm mode", self.batch_norm, BATCH_NORM),
            ("layout", self.layout or LAYOUTS[0], LAYOUTS),
        ):
            if word not in known:
                raise unknown(kind, word, known)
        measurable(self.device, self.dtype)
        check_present(self.device)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        strategy: a key of `strategies.STRATEGIES`.
        budget: in words, as `parse_budget` reads them; "" where the strategy spends none.
        policy, axis: of the strategy "ours".
    """

    strategy: str
    budget: str = ""
    policy: str = ""
    axis: str = ""

    @property
    def name(self) -> str:
        """What tells it from the other rows."""
        return " ".join(word for word in (self.policy or self.strategy, self.axis, self.budget) if word)


@dataclass(frozen=True)
class Words:
    """Lists as they are written on the command line."""

    budgets: Sequence[str] = ("0", "1/16", "1/8", "1/4", "1/2", "1")
    policies: Sequence[str] = ("random", "velocity")
    axes: Sequence[str] = ("out",)
    alternatives: Sequence[str] = field(default_factory=tuple)
    alternatives_at: str | None = None


def amount(budget: str) -> dict[str, int | float]:
    """Arguments of `sb.Budget`: "0" is nothing, "1" is everything, the rest as `parse_budget` reads it."""
    if budget in (NOTHING, EVERYTHING):
        return {"fraction": float(budget)}
    return parse_budget(budget)


def cases(words: Words) -> list[Case]:
    """Every row, dense first. Budgets "0" and "1" leave a policy no choice, so that one of them stands for all.

    Raises:
        UserError: a word that means nothing.
    """
    from sparse_bwd.measure.bench.strategies import DENSE, OURS, STRATEGIES

    for kind, given, known in (
        ("policy", words.policies, POLICIES),
        ("axis", words.axes, AXES),
        ("alternative", words.alternatives, [name for name in STRATEGIES if name not in (OURS, DENSE)]),
    ):
        for word in given:
            if word not in known:
                raise unknown(kind, word, known)
    for budget in words.budgets:
        amount(budget)
    found = [Case(DENSE)]
    for name in words.alternatives:
        if not STRATEGIES[name].spends:
            found.append(Case(name))
        else:
            found.append(Case(name, words.alternatives_at or middle(words.budgets)))
    for axis in words.axes:
        for budget in words.budgets:
            policies = {NOTHING: ["frozen"], EVERYTHING: ["full"]}.get(budget, list(words.policies))
            found += [Case(OURS, budget, policy, axis) for policy in policies]
    return list(dict.fromkeys(found))


def middle(budgets: Sequence[str]) -> str:
    """The median of the budgets that are a part of the weights."""
    parts = [budget for budget in budgets if {"fraction", "params"} & set(amount(budget))]
    parts = [budget for budget in parts if budget not in (NOTHING, EVERYTHING)]
    if not parts:
        raise UserError(
            "The alternatives need a budget of weights to spend: name one with --alternatives-at, as in 1/8."
        )
    return sorted(parts, key=lambda budget: next(iter(amount(budget).values())))[(len(parts) - 1) // 2]
