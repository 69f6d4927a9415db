"""The policies: velocity, random, sparse-update scheme, full, frozen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.memory.predict import velocity_layers
from sparse_bwd.nn import layers
from sparse_bwd.selection.budget import Budget
from sparse_bwd.selection.costs import greedy_prefix
from sparse_bwd.selection.policy import BudgetPolicy, Policy
from sparse_bwd.selection.probe import check_probe
from sparse_bwd.selection.ranks import mean_over_ranks
from sparse_bwd.selection.responses import ResponseMeter
from sparse_bwd.selection.schemes import CRITERIA, Scheme, check_scheme, find_scheme, scheme_selection
from sparse_bwd.selection.selection import Channels, Selection
from sparse_bwd.selection.sketch import NUMBERS, SketchMeter
from sparse_bwd.selection.velocity import Velocity

SchemeLike = Scheme | str | os.PathLike[str]


class FullPolicy(Policy):
    """Trains every swapped layer whole, biases included."""

    def __init__(self, model: nn.Module, axis: str = "out", bias: str = "all") -> None:
        super().__init__(model, axis, bias)

    def _choose(self) -> Selection:
        return Selection({name: Channels(None, self.axis, self.bias) for name in self.table.names})


class FrozenPolicy(Policy):
    """Trains nothing but `always_train` and what the batch-norm mode of `convert` trains."""

    def __init__(self, model: nn.Module, axis: str = "out") -> None:
        super().__init__(model, axis)

    def _choose(self) -> Selection:
        return Selection()


class RandomPolicy(BudgetPolicy):
    """Channels drawn uniformly until the next one would exceed the budget, each at its true cost.

    Args:
        redraw: draw again at every step, or keep the first draw.
        parity: spend the budget as the paper's code did (`sparse_bwd.selection.parity`); axis "out", weights only.
        keep_layers: draw within the layers of the first draw; as in `BudgetPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        axis: str = "out",
        redraw: bool = True,
        seed: int = 0,
        bias: str = "selected",
        parity: bool = False,
        keep_layers: bool = False,
    ) -> None:
        super().__init__(model, budget, axis, bias, seed, parity, keep_layers)
        self.redraw = bool(redraw)

    def _choose(self) -> Selection:
        if self.selection is not None and not self.redraw:
            return self.selection
        return self._draw()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "redraw": self.redraw}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if state.get("redraw") != self.redraw:
            raise ValueError(
                f"The saved policy has redraw {state.get('redraw')!r}, this one {self.redraw!r}."
            )


class VelocityPolicy(BudgetPolicy):
    """The channels whose responses to the probe change fastest per weight (arXiv 2312.05282).

    The first step measures the responses that later ones are compared with, and selects by `first`; velocity selects
    from the second step on. Under a budget of weights the ranking is `|v| / cost`, over all layers together, and the
    greedy prefix of it is selected. Under one of bytes or operations the selection is that of the largest sum of `|v|`,
    where opening a layer costs too (`sparse_bwd.selection.knapsack`).

    Args:
        probe: a few images, or a tuple or list (arguments) or a dict (keyword arguments) of model inputs; moved to the
            model's device for each measurement. It must be the same in a resumed run. `noise_images` makes a probe
            without data, which finds fewer of the same channels.
        axis: "in" measures the velocity of the layers' input channels.
        recursion, mu: "paper" or "reference" form of the velocity, and the weight of the previous one
            (`sparse_bwd.selection.velocity`).
        first: first selection: "random" (under the budget), "full", a scheme (name, file or `Scheme`; read on `axis`),
            or a selection.
        order: "fastest", or "slowest" as the control.
        parity: spend the budget as the paper's code did, the first, random selection included
            (`sparse_bwd.selection.parity`); axis "out", weights only.
        measure: "exact", the paper's: all responses are kept between steps, one number per channel, position and
            image. "sketch": `numbers` per channel, whatever the size of the images and the probe; the error of
            1 - similarity is then about sqrt(2 / numbers) of it (`sparse_bwd.selection.sketch`). With the default of 16
            in float16, 32 bytes, selections differ from exact ones by less than those of two probes of 10 images
            (benchmarks/results/velocity.md). Either way the recursion keeps 24 bytes more per channel.
        storage: dtype of what is kept; None: float32 (exact) or float16 (sketch).
        numbers: per channel, of "sketch".
        keep_layers: select within the layers of the first selection; as in `BudgetPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        probe: Any,
        axis: str = "out",
        recursion: str = "paper",
        mu: float = 0.5,
        first: str | Scheme | os.PathLike[str] | Selection | Mapping[str, Any] = "random",
        order: str = "fastest",
        seed: int = 0,
        bias: str = "selected",
        parity: bool = False,
        storage: torch.dtype | None = None,
        measure: str = "sketch",
        numbers: int = NUMBERS,
        keep_layers: bool = False,
    ) -> None:
        if order not in ("fastest", "slowest"):
            raise ValueError(f"order is {order!r}; it must be 'fastest' or 'slowest'.")
        self.meter = make_meter(measure, storage, numbers, seed)
        self.probe = check_probe(probe)
        self._measured_by = (axis, measure, storage, numbers)
        self._responses: int | None = None  # bytes, once they are known
        super().__init__(model, budget, axis, bias, seed, parity, keep_layers)
        self.order = order
        self.velocity = Velocity(len(self.table), recursion, mu)
        self.first = self._read_first(first)

    def _read_first(self, first: Any) -> str | Scheme | Selection:
        """Check `first` now, rather than at the first step."""
        if isinstance(first, str) and first in ("random", "full"):
            return first
        if isinstance(first, Mapping):
            chosen = Selection(first)
            chosen.validate(self.model)
            return chosen
        scheme = find_scheme(first)
        check_scheme(self.model, scheme)
        return scheme

    @property
    def held_bytes(self) -> int:
        if self._responses is None:
            self._responses = sum(velocity_layers(self.model, self.probe, *self._measured_by).values())
        return super().held_bytes + self._responses

    @property
    def velocity_bytes(self) -> int:
        return self.meter.bytes + self.velocity.bytes

    def _unmeasured(self) -> tuple[str, ...]:
        return self.meter.unmeasured

    def _measure(self) -> Tensor:
        """phi of every row of the table, from one pass over the probe."""
        swapped = layers(self.model)
        channels = {name: (swapped[name], size) for name, size in self.table.channels.items()}
        return mean_over_ranks(
            self.table.gather(self.meter.measure(self.model, channels, self.axis, self.probe))
        )

    def _choose(self) -> Selection:
        phi = self._measure()
        if self.steps == 0:
            return self._choose_first()
        speed = self.velocity.update(phi).abs()
        if self.keep_layers:
            score = speed if self.limits is not None else speed / self.table.cost
            return self._take(torch.sort(score, descending=self.order == "fastest", stable=True).indices)
        if self.limits is not None:
            limits, score = self.limits, speed.max() - speed if self.order == "slowest" else speed
            order = torch.sort(score, descending=True, stable=True).indices
            return self._fit(lambda amounts: limits.best(score, amounts), order)
        assert self.budget is not None
        score = speed / self.cost
        if self.order == "slowest":
            score = -score
        return self._select(greedy_prefix(score, self.cost, self.budget, self.parity))

    def _choose_first(self) -> Selection:
        if self.first == "random":
            return self._draw()
        if isinstance(self.first, Selection):
            chosen = self.first
        elif isinstance(self.first, Scheme):
            chosen = scheme_selection(self.model, self.first, self.axis)
        else:
            chosen = self.table.selection(torch.arange(len(self.table)), self.bias)
        if self.limits is not None:
            self.need = self.limits.need(chosen)
            if over := self.limits.excess(self.need):
                raise ValueError(
                    f"The first selection takes {over}, more than the budget of {self.limits.budget}; "
                    "leave out first=, so that one is drawn that fits, or raise the budget."
                )
        return chosen

    def state_dict(self) -> dict[str, Any]:
        own = {"order": self.order}
        state = {"velocity": self.velocity.state_dict(), "responses": self.meter.state_dict()}
        return {**super().state_dict(), **own, **state}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if state.get("order") != self.order:
            raise ValueError(f"The saved policy has order {state.get('order')!r}, this one {self.order!r}.")
        self.velocity.check_state(state.get("velocity"))
        self.meter.check_state(state.get("responses"), self.table.channels)

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.velocity.load_state_dict(state["velocity"])
        self.meter.load_state_dict(state["responses"])


def make_meter(
    measure: str, storage: torch.dtype | None, numbers: int, seed: int
) -> ResponseMeter | SketchMeter:
    """The meter that `measure` names; storage None is its default. ValueError if there is none."""
    if measure == "exact":
        return ResponseMeter(torch.float32 if storage is None else storage)
    if measure == "sketch":
        return SketchMeter(numbers, torch.float16 if storage is None else storage, seed)
    raise ValueError(f"measure is {measure!r}; it must be 'exact' or 'sketch'.")


class SparseUpdatePolicy(Policy):
    """A fixed scheme of layers and ratios, chosen once at the first step and kept (arXiv 2206.15472).

    Args:
        scheme: name of a built-in scheme ("mbv2-1" to "mbv2-5", likewise "mcunet-" and "proxyless-"; "resnet18-1" to
            "resnet18-3" and likewise "resnet50-", found by `sparse-bwd search` with norm_shift), a `Scheme`, or the
            path of a scheme file.
        axis: "in" as its authors (input channels of largest L2 norm), or "out".
        criterion: "largest", "smallest" or "random" channels.
        norm_shift: also train the shift of the norm layers that follow the last n_bias convolutions; for networks whose
            convolutions have no bias, where the scheme's bias part otherwise has no effect.
        seed: of the "random" criterion.
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: SchemeLike,
        axis: str = "in",
        criterion: str = "largest",
        norm_shift: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model, axis)
        self.scheme = find_scheme(scheme)
        if criterion not in CRITERIA:
            raise ValueError(f"criterion is {criterion!r}; it must be 'largest', 'smallest' or 'random'.")
        self.criterion, self.norm_shift, self.seed = criterion, bool(norm_shift), seed
        check_scheme(model, self.scheme)

    def _choose(self) -> Selection:
        if self.selection is not None:
            return self.selection
        return scheme_selection(
            self.model, self.scheme, self.axis, self.criterion, self.norm_shift, self.seed
        )

    def state_dict(self) -> dict[str, Any]:
        own = {"criterion": self.criterion, "norm_shift": self.norm_shift, "seed": self.seed}
        return {**super().state_dict(), "scheme": self.scheme.to_dict(), **own}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        mine = SparseUpdatePolicy.state_dict(self)
        for key in ("scheme", "criterion", "norm_shift", "seed"):
            if state.get(key) != mine[key]:
                raise ValueError(f"The saved policy has {key} {state.get(key)!r}, this one {mine[key]!r}.")
