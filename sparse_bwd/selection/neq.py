"""NEq: freeze the neurons that are at equilibrium, without a budget (METHOD 6; arXiv 2207.09455).

    frozen until the next step   |v_c| <= threshold       or the int(C (1 - top)) smallest |v_c| of each layer
    pin                          frozen once, frozen for good

v_c: velocity of channel c (`velocity.py`), of its responses to the probe or, with measure="weights", of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import layers
from sparse_bwd.selection.policies import make_meter
from sparse_bwd.selection.policy import Policy
from sparse_bwd.selection.probe import check_probe
from sparse_bwd.selection.ranked import check_settings
from sparse_bwd.selection.ranks import mean_over_ranks
from sparse_bwd.selection.responses import Meter
from sparse_bwd.selection.selection import Selection
from sparse_bwd.selection.sketch import NUMBERS
from sparse_bwd.selection.velocity import Velocity
from sparse_bwd.selection.weights import WeightMeter

THRESHOLD = 1e-3  # of the authors' runs on CIFAR-10 and ImageNet


class NEqPolicy(Policy):
    """Trains the channels that are not at equilibrium. The number of trained weights follows from that.

    Args:
        probe: as in `VelocityPolicy`; None with measure="weights".
        threshold: a channel is at equilibrium if `|velocity|` is at most this; 1e-3 unless `top` is given.
        top: instead, the share of each layer's channels, of largest `|velocity|`, that is trained.
        pin: a channel that was frozen once is never trained again.
        measure: "exact" or "sketch" as in `VelocityPolicy`; exact by default, since the threshold is a number and not a
            rank. Or "weights": similarity of successive weights in place of responses (`param_norm` of the authors'
            code), which keeps a copy of the weights and needs no probe.
        recursion, mu: form of the velocity; the authors' is "reference" with 0.5.
        warmup: steps that select `first`, at least 1: velocity needs two measurements.
        first: "full" or a selection.
        storage, numbers: as in `VelocityPolicy`.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any = None,
        threshold: float | None = None,
        top: float | None = None,
        pin: bool = False,
        axis: str = "out",
        measure: str = "exact",
        recursion: str = "reference",
        mu: float = 0.5,
        warmup: int = 1,
        first: str | Selection | Mapping[str, Any] = "full",
        bias: str = "selected",
        storage: torch.dtype | None = None,
        numbers: int = NUMBERS,
    ) -> None:
        super().__init__(model, axis, bias)
        self.threshold, self.top = _rule(threshold, top)
        if not isinstance(warmup, int) or warmup < 1:
            raise ValueError(f"warmup is {warmup!r}; it must be a whole number of steps, at least 1.")
        self.warmup, self.pin = warmup, bool(pin)
        self.meter: Meter | WeightMeter
        if measure == "weights":
            self.probe, self.meter = None, WeightMeter()
        else:
            self.probe, self.meter = check_probe(probe), make_meter(measure, storage, numbers, seed=0)
        self.velocity = Velocity(len(self.table), recursion, mu)
        self.pinned = torch.zeros(len(self.table), dtype=torch.bool)
        self.first = self._read_first(first)

    def _read_first(self, first: Any) -> Selection:
        """Check `first` now, rather than at the first step."""
        if isinstance(first, Mapping):
            chosen = Selection(first)
            chosen.validate(self.model)
            return chosen
        if first != "full":
            raise ValueError(f"first is {first!r}; it must be 'full' or a selection.")
        return self.table.selection(torch.arange(len(self.table)), self.bias)

    @property
    def velocity_bytes(self) -> int:
        return self.meter.bytes + self.velocity.bytes

    def _unmeasured(self) -> tuple[str, ...]:
        return self.meter.unmeasured

    def _choose(self) -> Selection:
        swapped = layers(self.model)
        channels = {name: (swapped[name], size) for name, size in self.table.channels.items()}
        phi = mean_over_ranks(
            self.table.gather(self.meter.measure(self.model, channels, self.axis, self.probe))
        )
        if self.steps == 0:
            return self.first
        speed = self.velocity.update(phi).abs()
        if self.steps < self.warmup:
            return self.first
        frozen = self._at_equilibrium(speed)
        if self.pin:
            frozen = self.pinned = frozen | self.pinned
        return self.table.selection((~frozen).nonzero().flatten(), self.bias)

    def _at_equilibrium(self, speed: Tensor) -> Tensor:
        """Which rows are frozen, of their |v|. Equal ones of a layer: the first channels are trained."""
        if self.threshold is not None:
            return speed <= self.threshold
        frozen = torch.ones(len(speed), dtype=torch.bool)
        for part, flags in zip(speed.split(self.table.sizes), frozen.split(self.table.sizes), strict=True):
            # Of the decimal number that was written: 0.7 of 10 channels are 7, though 10 * 0.7 > 7 in floats.
            trained = math.ceil(len(part) * Fraction(str(self.top)))
            flags[torch.sort(part, descending=True, stable=True).indices[:trained]] = False
        return frozen

    def _settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "top": self.top, "pin": self.pin, "warmup": self.warmup}

    def state_dict(self) -> dict[str, Any]:
        measured = {"velocity": self.velocity.state_dict(), "responses": self.meter.state_dict()}
        return {**super().state_dict(), **self._settings(), **measured, "pinned": self.pinned.clone()}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        check_settings(state, self._settings())
        self.velocity.check_state(state.get("velocity"))
        self.meter.check_state(state.get("responses"), self.table.channels)
        pinned = state.get("pinned")
        if not isinstance(pinned, Tensor) or pinned.shape != self.pinned.shape or pinned.dtype != torch.bool:
            raise ValueError("The policy state does not say which channels of this model are pinned.")

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.velocity.load_state_dict(state["velocity"])
        self.meter.load_state_dict(state["responses"])
        self.pinned = state["pinned"].clone()


def _rule(threshold: float | None, top: float | None) -> tuple[float | None, float | None]:
    """The threshold or the share, checked; exactly one of them is not None."""
    if threshold is not None and top is not None:
        raise ValueError("threshold and top are two rules for the same; give one of them.")
    if top is not None:
        if not 0 <= top <= 1:
            raise ValueError(f"top is {top!r}; it is a share of the channels, from 0 to 1.")
        return None, float(top)
    threshold = THRESHOLD if threshold is None else threshold
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold!r}; it must be a finite number of at least 0.")
    return float(threshold), None
