"""Policies that rank channels by one score and take the best that the budget pays for.

    GradientNormPolicy    "norm": n_c = |dL/dW_c|_2;   "per_weight": n_c / C^W_c;   "relative": n_c / (C^W_c + C^A_c)
    WeightNormPolicy      "norm": |W_c|_2;             "per_weight": |W_c|_2 / C^W_c

C^W_c: weights of channel c; C^A_c: its share of the layer's input (`gradients.py`). All layers together are ranked,
then the greedy prefix. "relative" is TraDy's relative gradient norm, and GradientNormPolicy with it its Det-RGN.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bwd.nn import layers
from sparse_bwd.selection.budget import Budget
from sparse_bwd.selection.gradients import GradientMeter
from sparse_bwd.selection.policy import BudgetPolicy, Policy
from sparse_bwd.selection.ranks import mean_over_ranks
from sparse_bwd.selection.selection import Selection
from sparse_bwd.selection.weights import weight_norms

ORDERS = ("largest", "smallest")


def check_word(name: str, value: str, words: tuple[str, ...]) -> str:
    """Return `value`; ValueError that lists the words unless it is one of them."""
    if value not in words:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, words))}.")
    return value


def check_settings(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """ValueError that names the first setting in which a saved policy differs from this one."""
    for key, value in mine.items():
        if state.get(key) != value:
            raise ValueError(f"The saved policy has {key} {state.get(key)!r}, this one {value!r}.")


class RankedPolicy(BudgetPolicy):
    """Greedy prefix of the channels by one score; a subclass defines `_score` and nothing else.

    Args:
        model, budget, axis, bias: as in `BudgetPolicy`.
        order: "largest" or "smallest" scores first; equal ones in the order of layers and channels.
        refresh: score again at every step, or keep the first selection.
        keep_layers: select within the layers of the first selection; as in `BudgetPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        axis: str = "out",
        order: str = "largest",
        refresh: bool = True,
        bias: str = "selected",
        keep_layers: bool = False,
    ) -> None:
        super().__init__(model, budget, axis, bias, seed=0, keep_layers=keep_layers)
        self.order, self.refresh = check_word("order", order, ORDERS), bool(refresh)

    @abstractmethod
    def _score(self) -> Tensor:
        """One number per row of `self.table`, on the CPU."""

    def _choose(self) -> Selection:
        if self.selection is not None and not self.refresh:
            return self.selection
        score = self._score()
        finite = bool(score.isfinite().all())
        if score.shape != (len(self.table),) or not finite:
            found = f"shape {tuple(score.shape)}" if finite else "NaN or infinity"
            raise ValueError(
                f"{type(self).__name__}._score() must give {len(self.table)} finite numbers, one per channel; "
                f"got {found}."
            )
        best_first = torch.sort(score, descending=self.order == "largest", stable=True).indices
        return self._take(best_first)

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have been made with; subclasses add theirs."""
        return {"order": self.order, "refresh": self.refresh}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self._settings()}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        check_settings(state, self._settings())


class GradientNormPolicy(RankedPolicy):
    """The channels with the largest gradient, measured dense on labelled batches at every step.

    Args:
        data, loss_fn, mode: what the gradient is of; see `GradientMeter`. In a resumed run they must be the same.
        score: "per_weight", "norm" or "relative"; the module docstring has the formulas.
        order, refresh, keep_layers: as in `RankedPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        data: Any,
        loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
        axis: str = "out",
        score: str = "per_weight",
        order: str = "largest",
        refresh: bool = True,
        bias: str = "selected",
        mode: str = "eval",
        keep_layers: bool = False,
    ) -> None:
        super().__init__(model, budget, axis, order, refresh, bias, keep_layers)
        self.score = check_word("score", score, ("norm", "per_weight", "relative"))
        self.meter = GradientMeter(data, loss_fn, mode)

    def _score(self) -> Tensor:
        found = gradient_norms(self, self.meter)
        if self.score == "relative":
            return found / self.meter.space(self.model, self.table)
        return found / self.table.cost if self.score == "per_weight" else found

    def _unmeasured(self) -> tuple[str, ...]:
        return self.meter.unmeasured

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "score": self.score, "mode": self.meter.mode}


class WeightNormPolicy(RankedPolicy):
    """The channels whose weights have the largest L2 norm, or the smallest; needs no data.

    Args:
        score: "norm" or "per_weight"; the module docstring has the formulas.
        order, refresh, keep_layers: as in `RankedPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        axis: str = "out",
        score: str = "norm",
        order: str = "largest",
        refresh: bool = True,
        bias: str = "selected",
        keep_layers: bool = False,
    ) -> None:
        super().__init__(model, budget, axis, order, refresh, bias, keep_layers)
        self.score = check_word("score", score, ("norm", "per_weight"))

    def _score(self) -> Tensor:
        swapped = layers(self.model)
        found = self.table.gather({name: weight_norms(swapped[name], self.axis) for name in self.table.names})
        return found / self.table.cost if self.score == "per_weight" else found

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "score": self.score}


def gradient_norms(policy: Policy, meter: GradientMeter) -> Tensor:
    """n_c of every row of the policy's table; ValueError if it is zero everywhere, so that nothing can be ranked."""
    found = mean_over_ranks(meter.norms(policy.model, policy.table))
    if not bool((found > 0).any()):
        raise ValueError(
            f"The gradient of the loss is zero in all {len(policy.table.names)} layers, so that it ranks no channel; "
            "give other batches or another loss."
        )
    return found
