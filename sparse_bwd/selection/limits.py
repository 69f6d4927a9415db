"""A budget of bytes or operations for one model and batch: selections that keep it, and use it.

`charges.py` says what each channel adds; `memory.predict` and `flops.py` say what a whole selection takes. The first is
additive, which choosing needs, the second exact: the highest moment of a step is not where everything that is kept is
alive. So a choice is made under an additive amount, measured, and the amount is moved until the measured need fits and
fills the budget. What the amount is moved by is remembered: the next step of a policy begins there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bwd.memory.predict import find_optimizer, predict
from sparse_bwd.memory.simulate import scalar_of
from sparse_bwd.selection.budget import GIGA, MIB, Budget
from sparse_bwd.selection.charges import Costs, channel_costs
from sparse_bwd.selection.costs import CostTable
from sparse_bwd.selection.flops import backward_flops
from sparse_bwd.selection.knapsack import Limit, solve
from sparse_bwd.selection.probe import in_mode
from sparse_bwd.selection.selection import Selection

Choose = Callable[[Sequence[Limit]], Tensor]
FULL = 0.98  # of a budget: nothing more is tried
ROUNDS = 16
MISSES = 3  # choices in a row that exceed the budget


@dataclass(frozen=True)
class Need:
    """What a step takes under a selection: bytes beyond the network, operations of backward; None: not limited."""

    bytes: int | None = None
    flops: int | None = None

    def of(self, unit: str) -> float:
        """The amount in a unit, "bytes" or "flops", that is limited."""
        return float(getattr(self, unit))


class Limits:
    """The limits of `budget` on selections of `model`.

    Args:
        table: the channels; bias: which biases go with them.
        held: bytes that the policy itself holds between steps.

    Raises:
        ValueError: the budget has no batch, or is below what the smallest selection takes.
    """

    def __init__(
        self,
        model: nn.Module,
        table: CostTable,
        budget: Budget,
        bias: str,
        held: Callable[[], int] = lambda: 0,
    ) -> None:
        if budget.batch is None:
            raise ValueError(
                f"A budget of {budget} depends on the batch: give an example input of the model as batch=."
            )
        self.model, self.table, self.budget, self.bias, self.held = model, table, budget, bias, held
        self.optimizer = budget.optimizer or "sgd_momentum"
        self.loss = budget.loss or example_loss
        make = find_optimizer(self.optimizer)
        with in_mode(model, training=True):
            self.costs: Costs = channel_costs(model, table, budget.batch, make, bias)
        self._level = dict.fromkeys(self.amounts, 0.0)  # measured need beyond the additive cost
        self._least: float | None = None  # bytes of a step that trains nothing that a policy selects
        self._check_smallest()

    @property
    def amounts(self) -> dict[str, float]:
        """The limits, by unit."""
        given = {"bytes": self.budget.bytes, "flops": self.budget.flops}
        return {name: float(value) for name, value in given.items() if value is not None}

    def need(self, selection: Selection) -> Need:
        """What a step takes under `selection`, in the units of the budget."""
        size = operations = None
        with in_mode(self.model, training=True):
            if self.budget.bytes is not None:
                found = predict(self.model, selection, self.budget.batch, self.optimizer, self.loss)
                size = found.needed + self.held()
            if self.budget.flops is not None:
                operations = sum(backward_flops(self.model, selection, self.budget.batch).values())
        return Need(size, operations)

    def excess(self, need: Need) -> str:
        """What `need` takes, in words, of the units in which it exceeds the budget; empty if it fits."""
        words = {"bytes": (MIB, "MiB", 1), "flops": (GIGA, "GFLOPs of backward", 3)}
        over = []
        for name, amount in self.amounts.items():
            unit, word, digits = words[name]
            if need.of(name) > amount:
                over.append(f"{need.of(name) / unit:,.{digits}f} {word}")
        return " and ".join(over)

    def fit(self, choose: Choose, order: Tensor) -> tuple[Tensor, Need]:
        """Rows of the table that `choose` takes under the largest limits that keep the budget, and what they need.

        Args:
            choose: from additive limits, in forward order as `costs`, to rows of the table.
            order: all rows, best first; what `choose` leaves of the budget is spent in this order on open layers.
        """
        best: tuple[float, Tensor, Need] | None = None
        search = None if self._least is None else _Search(self.amounts["bytes"], self._least)
        floor = misses = 0
        for _ in range(ROUNDS):
            rows = choose([self._limit(name, floor) for name in self.amounts]).sort().values
            need = self.need(self.table.selection(rows, self.bias))
            misses = misses + 1 if self.excess(need) else 0
            if misses == MISSES and search is not None:
                # Training a layer so deep costs a jump that the additive cost does not know: go on without it.
                floor, misses, search.high = self._first(rows) + 1, 0, None
            if not self.excess(need):
                used = self._share(need)
                if best is None or used > best[0]:
                    best = (used, rows, need)
                if len(rows) == len(self.table) or self._is_full(need):
                    break
            self._move(rows, need, search)
        if best is None:
            nothing = torch.empty(0, dtype=torch.int64)
            return nothing, self.need(self.table.selection(nothing, self.bias))
        return self._fill(best[1], best[2], order)

    def _fill(self, rows: Tensor, need: Need, order: Tensor) -> tuple[Tensor, Need]:
        """`rows` and as many more of their layers, in `order`, as the budget still pays for; by bisection."""
        is_open = torch.zeros(len(self.table.names), dtype=torch.bool)
        is_open[self.table.layer[rows]] = True
        waiting = order[is_open[self.table.layer[order]] & ~torch.isin(order, rows)]
        fits, fails = 0, len(waiting) + 1
        while fails - fits > 1 and not self._is_full(need):
            count = len(waiting) if fails > len(waiting) else (fits + fails) // 2
            more = torch.cat([rows, waiting[:count]])
            found = self.need(self.table.selection(more, self.bias))
            if self.excess(found):
                fails = count
            else:
                fits, need = count, found
        return torch.cat([rows, waiting[:fits]]), need

    def best(self, score: Tensor, limits: Sequence[Limit]) -> Tensor:
        """Rows with the largest total `score` [rows] (not negative) under `limits`."""
        parts = score.split(self.table.sizes)
        counts = solve([parts[i] for i in self.costs.order.tolist()], limits)
        starts = torch.tensor([0, *self.table.sizes]).cumsum(0)
        chosen = [
            starts[i] + torch.sort(parts[i], descending=True, stable=True).indices[: int(count)]
            for i, count in zip(self.costs.order.tolist(), counts, strict=True)
        ]
        return torch.cat(chosen)

    def in_order(self, order: Tensor, limits: Sequence[Limit]) -> Tensor:
        """Of the rows `order`, best first, those that still fit when their turn comes; the others are passed over."""
        place = torch.empty(len(self.costs.order), dtype=torch.int64)
        place[self.costs.order] = torch.arange(len(place))
        counters = [_Counter(limit) for limit in limits]
        chosen = []
        for row, layer in zip(order.tolist(), place[self.table.layer[order]].tolist(), strict=True):
            costs = [counter.cost(layer) for counter in counters]
            if all(cost <= counter.left for cost, counter in zip(costs, counters, strict=True)):
                for counter, cost in zip(counters, costs, strict=True):
                    counter.take(layer, cost)
                chosen.append(row)
        return torch.tensor(chosen, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """What the next choices depend on: the budget in words, and where the search for the amounts begins."""
        return {"budget": str(self.budget), "level": dict(self._level)}

    def check_state(self, state: Any) -> None:
        """ValueError unless `state` is of the same budget."""
        if not isinstance(state, Mapping) or state.get("budget") != str(self.budget):
            found = state.get("budget") if isinstance(state, Mapping) else None
            raise ValueError(f"The saved policy has a budget of {found}, this one of {self.budget}.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned (already checked by `check_state`)."""
        self._level = dict(state["level"])

    def _limit(self, name: str, floor: int) -> Limit:
        """The additive limit, too small for any layer before the place `floor` in the forward."""
        amount, charges = max(self.amounts[name] - self._level[name], 0.0), self.costs.of(name)
        too_much = torch.zeros_like(charges.depth)
        too_much[:floor] = 2 * amount + 1
        return Limit(replace(charges, depth=charges.depth + too_much), amount)

    def _first(self, rows: Tensor) -> int:
        """The place in the forward of the first layer with one of `rows`."""
        is_open = torch.zeros(len(self.table.names), dtype=torch.bool)
        is_open[self.table.layer[rows]] = True
        return int(is_open[self.costs.order].int().argmax())

    def _additive(self, name: str, rows: Tensor) -> float:
        counts = torch.bincount(self.table.layer[rows], minlength=len(self.table.names))
        charges = self.costs.of(name)
        return float(charges.cost(counts[self.costs.order]))

    def _share(self, need: Need) -> float:
        return sum(need.of(name) / amount for name, amount in self.amounts.items())

    def _is_full(self, need: Need) -> bool:
        used = [need.of(name) / amount for name, amount in self.amounts.items()]
        return FULL <= max(used) <= 1

    def _move(self, rows: Tensor, need: Need, search: _Search | None) -> None:
        """Move the additive amounts towards those whose choice fills the budget."""
        if search is not None and need.bytes is not None:
            amount = self.amounts["bytes"] - self._level["bytes"]
            self._level["bytes"] = self.amounts["bytes"] - search.next(amount, need.bytes)
        if need.flops is not None:
            self._level["flops"] = need.flops - self._additive("flops", rows)

    def _check_smallest(self) -> None:
        """ValueError with what would fit if not even one channel does."""
        nothing = self.need(Selection())
        self._least = None if nothing.bytes is None else float(nothing.bytes)
        self._level = {name: nothing.of(name) for name in self.amounts}
        least = {}
        for name in self.amounts:
            least[name] = self._level[name] + float(self.costs.of(name).of_one().min())
        smallest = Need(**{name: int(value) for name, value in least.items()})
        if over := self.excess(smallest):
            raise ValueError(
                f"The budget of {self.budget} is too small for this batch: with a single channel a step takes up to "
                f"{over}. Raise the budget to that, or use a smaller batch or smaller images."
            )


class _Search:
    """Looks for the additive amount whose choice needs just as much as the budget has."""

    def __init__(self, target: float, least: float) -> None:
        self.target = target
        self.low = self._before = (0.0, least)  # the largest amount that kept the budget, and what it needed
        self.high: tuple[float, float] | None = None  # the smallest that did not
        self._misses = 0  # of them in a row

    def next(self, amount: float, need: float) -> float:
        """The amount to try next, given what the choice under `amount` needed."""
        if need > self.target:
            self.high, self._misses = (amount, need), self._misses + 1
        else:
            self._misses = 0
            if amount > self.low[0]:
                self._before, self.low = self.low, (amount, need)
        room = (1 + FULL) / 2 * self.target - self.low[1]
        if self.high is None:
            return self.low[0] + room / self._slope()
        width = self.high[0] - self.low[0]
        share = min(max(room / (self.high[1] - self.low[1]), 0.1), 0.9)
        # Opening a layer is a jump, which a line through two points overshoots again and again.
        return self.low[0] + width * share * 0.5 ** max(self._misses - 1, 0)

    def _slope(self) -> float:
        """What the need rises by per amount; less than 1 where other moments of the step are higher."""
        rise, run = self.low[1] - self._before[1], self.low[0] - self._before[0]
        return min(max(rise / run, 0.1), 1.0) if run > 0 else 1.0


class _Counter:
    """What is left of a limit while channels are taken one by one."""

    def __init__(self, limit: Limit) -> None:
        self.left, self._first = limit.amount, len(limit.charges.unit)
        charges = limit.charges
        self._unit, self._group = charges.unit.tolist(), charges.group.tolist()
        self._charge, self._depth = charges.charge.tolist(), [*charges.depth.tolist(), 0.0]
        self._opened: set[int] = set()

    def cost(self, layer: int) -> float:
        """Of one more channel of the layer."""
        group = self._group[layer]
        opening = 0.0 if group in self._opened else self._charge[group]
        deeper = self._depth[layer] - self._depth[self._first] if layer < self._first else 0.0
        return float(self._unit[layer] + opening + deeper)

    def take(self, layer: int, cost: float) -> None:
        """Choose that channel."""
        self.left -= cost
        self._opened.add(self._group[layer])
        self._first = min(self._first, layer)


def example_loss(output: Any) -> Tensor:
    """Cross-entropy with the first class where the output is [images, classes], else the sum of all floats in it."""
    if isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point():
        return F.cross_entropy(output, output.new_zeros(len(output), dtype=torch.int64))
    return scalar_of(output)
