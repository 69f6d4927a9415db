"""What all policies share: the step, the report, and the state that makes a resumed run select the same."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparse_bwd.nn import layers, norms
from sparse_bwd.selection.apply import GroupOf, apply, refuse_pending
from sparse_bwd.selection.budget import GIGA, MIB, Budget
from sparse_bwd.selection.costs import cost_table, prefix_length
from sparse_bwd.selection.limits import Choose, Limits, Need
from sparse_bwd.selection.parity import check_parity, code_cost, layer_order_prefix
from sparse_bwd.selection.ranks import of_first_rank
from sparse_bwd.selection.selection import BIAS_MODES, Selection

STATE_VERSION = 1


@dataclass(frozen=True)
class PolicyReport:
    """What the last step of a policy selected. Weights exclude biases, norm shifts and `always_train`."""

    policy: str
    step: int  # selections made so far, this one included
    budget: int | None  # weights; None for a policy without a budget of weights
    cost: int  # true trained weights
    total: int  # weights of all swapped layers
    channels: int
    layers: int  # layers with at least one trained channel
    bias_only: int
    norms: int
    velocity_bytes: int  # held between steps to measure velocity; 0 for other policies
    unmeasured: tuple[str, ...]  # layers that the probe pass did not call; their velocity is zero
    budget_bytes: int | None = (
        None  # and what a step needs of them, by prediction; None without such a budget
    )
    needed_bytes: int | None = None
    budget_flops: float | None = None  # of one backward pass, and what it takes
    backward_flops: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-friendly form."""
        return {**asdict(self), "unmeasured": list(self.unmeasured)}

    def __str__(self) -> str:
        budget = "without a budget of weights" if self.budget is None else f"of a budget of {self.budget:,}"
        text = (
            f"{self.policy} (selection {self.step}): {self.cost:,} weights {budget} "
            f"({self.cost / self.total:.1%} of {self.total:,}), {self.channels:,} channels in {self.layers} layers"
        )
        if self.budget_bytes is not None and self.needed_bytes is not None:
            text += f"; {self.needed_bytes / MIB:,.1f} of {self.budget_bytes / MIB:,.1f} MiB"
        if self.budget_flops is not None and self.backward_flops is not None:
            text += (
                f"; {self.backward_flops / GIGA:,.3f} of {self.budget_flops / GIGA:,.3f} GFLOPs of backward"
            )
        if self.bias_only or self.norms:
            text += f"; bias only in {self.bias_only} layers, shift of {self.norms} norm layers"
        if self.unmeasured:
            text += f"; {len(self.unmeasured)} layers not called by the probe"
        return text


class Policy(ABC):
    """Chooses a selection and applies it. Subclasses implement `_choose`.

    Args:
        model: a converted model; its layers must stay as they are while the policy is used.
        axis: "out" or "in"; depthwise layers have one axis and are the same under both.
        bias: which biases go with selected channels; see `Channels`.
    """

    def __init__(self, model: nn.Module, axis: str = "out", bias: str = "selected") -> None:
        if bias not in BIAS_MODES:
            raise ValueError(f"bias is {bias!r}; it must be 'selected', 'all' or 'none'.")
        self.model, self.bias = model, bias
        self.table = cost_table(model, axis)
        self.budget: int | None = None
        self.selection: Selection | None = None
        self.report: PolicyReport | None = None
        self.steps = 0

    @property
    def axis(self) -> str:
        """The axis on which channels are selected."""
        return self.table.axis

    @property
    def velocity_bytes(self) -> int:
        """Bytes held between steps to measure velocity."""
        return 0

    @property
    def held_bytes(self) -> int:
        """Bytes that the policy holds between steps in all, known before the first; a byte budget pays for them too."""
        return self.table.nbytes

    def step(self, optimizer: torch.optim.Optimizer | None = None, group: GroupOf | None = None) -> Selection:
        """Choose the next selection, apply it to the model and return it. With torch.distributed all ranks call it.

        Call it between optimizer steps. With `optimizer`, its param groups and the state of channels that stay selected
        are carried over; without, make the optimizer afterwards. Gradients that no step has used are refused before
        anything is measured or drawn. `group` says which param group a new parameter goes to; see `sparse_bwd.apply`.
        """
        self._check_model()
        refuse_pending({**layers(self.model), **norms(self.model)})
        selection = of_first_rank(self._choose())
        apply(self.model, selection, optimizer, group)
        self.selection, self.steps = selection, self.steps + 1
        self.report = self._report(selection)
        return selection

    @abstractmethod
    def _choose(self) -> Selection:
        """The selection for the time until the next step; the only thing that a policy must define."""

    def _unmeasured(self) -> tuple[str, ...]:
        return ()

    def _check_model(self) -> None:
        """ValueError if the layers of the model are no longer those that the policy was made for."""
        now = cost_table(self.model, self.axis)
        if now == self.table:
            return
        before, after = (
            {
                name: (size, unit)
                for name, size, unit in zip(table.names, table.sizes, table.unit, strict=True)
            }
            for table in (self.table, now)
        )
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        raise ValueError(
            f"The model has changed since the policy was made (layers {', '.join(changed[:5]) or 'in another order'}); "
            "make a new policy."
        )

    def _report(self, selection: Selection) -> PolicyReport:
        return PolicyReport(
            policy=type(self).__name__,
            step=self.steps,
            budget=self.budget,
            total=self.table.total,
            velocity_bytes=self.velocity_bytes,
            unmeasured=self._unmeasured(),
            **self._spent(),
            **asdict(selection.summary(self.model)),
        )

    def _spent(self) -> dict[str, Any]:
        """What the report says of a budget that is not one of weights."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that the next selections depend on, besides model and probe; safe for `torch.load(weights_only=True)`."""
        return {
            "version": STATE_VERSION,
            "policy": type(self).__name__,
            "axis": self.axis,
            "bias": self.bias,
            "budget": self.budget,
            "layers": self.table.channels,
            "steps": self.steps,
            "selection": None if self.selection is None else self.selection.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned. The model is left alone: next, `sb.apply(model, policy.selection)`.

        Raises ValueError, with nothing changed, if the state is of another policy, axis, budget or model.
        """
        self._check_state(state)
        selection = None if state["selection"] is None else Selection.from_dict(state["selection"])
        if selection is not None:
            selection.validate(self.model)
        self._load(state)
        self.selection, self.steps = selection, state["steps"]
        self.report = None if selection is None else self._report(selection)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Compare `state` with this policy; subclasses add their own keys."""
        if not isinstance(state, Mapping) or "policy" not in state:
            raise ValueError("This is not the state of a policy; pass what policy.state_dict() returned.")
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"The policy state has version {state.get('version')!r}; this library reads {STATE_VERSION}."
            )
        mine = Policy.state_dict(self)
        for key in ("policy", "axis", "bias", "budget"):
            if state.get(key) != mine[key]:
                raise ValueError(f"The saved policy has {key} {state.get(key)!r}, this one {mine[key]!r}.")
        if state.get("layers") != mine["layers"]:
            raise ValueError(
                "The saved policy was made for a model with other layers or channels than this one."
            )
        if not isinstance(state.get("steps"), int) or state["steps"] < 0 or "selection" not in state:
            raise ValueError("The policy state is incomplete: it has no number of steps or no selection.")

    def _load(self, state: Mapping[str, Any]) -> None:  # noqa: B027 -- optional
        """Take over what a subclass added to the state; called after every check has passed."""


class BudgetPolicy(Policy):
    """A policy that spends a budget, with its own random numbers.

    Args:
        model, axis, bias: as in `Policy`.
        budget: in weights (params= or fraction=): below the cheapest channel nothing is selected and a warning says so;
            at or above the cost of all channels everything is. In bytes or operations of a step (bytes=, flops= or
            both): no step of training takes more, by prediction; too little for a single channel is a ValueError.
        seed: of the generator (on the CPU, independent of torch's global one).
        parity: spend a budget of weights as the paper's code did (`sparse_bwd.selection.parity`).
        keep_layers: from the second selection on train channels of the same layers as in the first, at least one of
            each, so that a compiled step is compiled once. Layers that the first trains whole stay whole. A first
            selection beyond the budget (`first="full"`) counts for none.
    """

    budget: int | None  # weights
    limits: Limits | None  # of bytes and operations

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        axis: str,
        bias: str,
        seed: int,
        parity: bool = False,
        keep_layers: bool = False,
    ) -> None:
        if not isinstance(budget, Budget):
            raise TypeError(
                f"budget must be a Budget, such as Budget(params=192_311) or Budget(fraction=0.1), got {budget!r}."
            )
        if parity:
            check_parity(axis, budget)
            if keep_layers:
                raise ValueError(
                    "parity=True drops channels that tie, and with them layers; leave out parity or keep_layers."
                )
        super().__init__(model, axis, bias)
        self.parity, self.keep_layers = bool(parity), bool(keep_layers)
        # What a channel counts against the budget; only parity with the paper's code makes it another than it costs.
        self.cost = code_cost(model, self.table) if parity else self.table.cost
        self.generator = torch.Generator().manual_seed(seed)
        self.limits, self.need = None, Need()
        if budget.of_steps:
            self.limits = Limits(model, self.table, budget, bias, lambda: self.held_bytes)
            return
        self.budget = budget.weights(self.table.total)
        if 0 < self.budget < self.table.cheapest:
            warnings.warn(
                f"The budget of {self.budget:,} weights is below the cheapest channel, which costs "
                f"{self.table.cheapest:,}; nothing will be selected.",
                stacklevel=3,
            )

    def _select(self, rows: torch.Tensor) -> Selection:
        """Selection of `rows`, with a warning where there is none although the budget pays for a channel."""
        if not len(rows) and self.budget is not None and self.budget >= self.table.cheapest:
            warnings.warn(
                f"Nothing is selected: the first channel in line costs more than the budget of {self.budget:,} weights "
                "or, with parity=True, ties with one that does not fit.",
                stacklevel=4,
            )
        return self.table.selection(rows, self.bias)

    def _take(self, order: torch.Tensor) -> Selection:
        """Selection of the rows `order`, best first, as far as the budget goes.

        A budget of weights ends at the first row that it does not pay for. One of bytes or operations, under which a
        channel costs more where its layer has to be opened for it, passes over what no longer fits.
        """
        if self.keep_layers and self.selection is not None:
            kept = self.table.rows(self.selection)
            if self.budget is None or int(self.table.cost[kept].sum()) <= self.budget:
                order = self.table.within(order, kept)
        if self.limits is None:
            assert self.budget is not None
            if self.parity:
                return self._select(layer_order_prefix(order, self.cost, self.budget))
            return self._select(order[: prefix_length(self.table.cost[order], self.budget)])
        limits = self.limits
        return self._fit(lambda amounts: limits.in_order(order, amounts), order)

    def _fit(self, choose: Choose, order: torch.Tensor) -> Selection:
        """Selection of the rows that `choose` takes under the largest amounts that keep the budget."""
        assert self.limits is not None
        rows, self.need = self.limits.fit(choose, order)
        return self._select(rows)

    def _draw(self) -> Selection:
        """Channels in the order of a uniform permutation, as far as the budget goes."""
        return self._take(torch.randperm(len(self.table), generator=self.generator))

    def _spent(self) -> dict[str, Any]:
        if self.limits is None:
            return {}
        budget = self.limits.budget
        return {
            "budget_bytes": budget.bytes,
            "needed_bytes": self.need.bytes,
            "budget_flops": budget.flops,
            "backward_flops": self.need.flops,
        }

    def state_dict(self) -> dict[str, Any]:
        limits = (
            {} if self.limits is None else {"limits": self.limits.state_dict(), "need": asdict(self.need)}
        )
        own = {
            "generator": self.generator.get_state(),
            "parity": self.parity,
            "keep_layers": self.keep_layers,
        }
        return {**super().state_dict(), **own, **limits}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if state.get("parity", False) != self.parity:
            raise ValueError(f"The saved policy has parity {state['parity']!r}, this one {self.parity!r}.")
        if bool(state.get("keep_layers")) != self.keep_layers:
            raise ValueError(
                f"The saved policy has keep_layers {bool(state.get('keep_layers'))}, this one {self.keep_layers}."
            )
        if (self.limits is None) != ("limits" not in state):
            raise ValueError("Of the saved policy and this one only one has a budget of bytes or operations.")
        if self.limits is not None:
            self.limits.check_state(state["limits"])
        try:
            torch.Generator().set_state(state["generator"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError("The policy state holds no usable state of the random generator.") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.generator.set_state(state["generator"])
        if self.limits is not None:
            self.limits.load_state_dict(state["limits"])
            self.need = Need(**state["need"])
