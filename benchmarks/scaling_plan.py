"""The part of `benchmarks.scaling` that times what happens between steps: planning, apply, a round of velocity.

Planning needs shapes only and runs on the meta device. Policies that choose by values get drawn ones there; measuring
the real ones is what the sweep "velocity" times, on the CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from benchmarks import scaling_networks as networks
from benchmarks.scaling_fit import power
from sparse_bwd.measure.meter import Meter, quantiles
from sparse_bwd.memory import predict
from sparse_bwd.selection.limits import example_loss
from sparse_bwd.selection.policy import Policy

Json = dict[str, Any]
Parts = Mapping[str, Callable[[], object]]
LINEAR, SORTING = 1.1, 1.2  # exponents that pass; n log n rises by 1 + 1 / ln n
WALK = "PyTorch's parameters()"


class Life:
    """A network from `convert` to `restore`; what is timed is `parts`, in order."""

    def __init__(self, model: nn.Module, image: int) -> None:
        self.model = model
        device = next(model.parameters()).device
        self.images = torch.empty(2, 3, image, image, device=device)
        self.policies: dict[str, Policy] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def choosing(self) -> Parts:
        """From `convert` to `restore`, without what runs fake steps."""
        return {**self._between(), "restore": self._restore}

    def planning(self) -> Parts:
        """`choosing` with a prediction."""
        return {**self._between(), "predict": self._predict, "restore": self._restore}

    def _between(self) -> Parts:
        """All policies under a budget of a tenth of the weights, `apply` with an optimizer, and what they save."""
        makers: dict[str, Callable[[], Policy]] = {
            "random": lambda: sb.RandomPolicy(self.model, self._weights()),
            "gradient or weight norm": lambda: networks.DrawnPolicy(self.model, self._weights()),
            "velocity": self._velocity,
            "NEq": self._neq,
            "TraDy": self._trady,
            "sparse update": self._sparse_update,
            "full": lambda: sb.FullPolicy(self.model),
            "frozen": lambda: sb.FrozenPolicy(self.model),
        }
        return {
            "convert": lambda: sb.convert(self.model),
            **{name: partial(self._step, name, make) for name, make in makers.items()},
            "apply with an optimizer": self._apply,
            WALK: lambda: list(self.model.parameters()),
            "trainable_parameters": lambda: sb.trainable_parameters(self.model),
            "state_dict": self._state,
        }

    def budgets(self) -> Parts:
        """A budget of bytes, the middle between training nothing and training all, and one prediction."""
        return {
            "": self._prepare_bytes,
            "random, bytes": partial(self._step, "random", lambda: sb.RandomPolicy(self.model, self.bytes)),
            "velocity, bytes": self._velocity_bytes,
            "predict": self._predict,
        }

    def measuring(self) -> Parts:
        """A round of velocity beside the forward that it needs, and `apply` alone."""
        return {
            "": self._prepare_velocity,
            "forward of the probe": self._forward,
            "round of velocity": lambda: self.policies["velocity"].step(self.optimizer),
            "apply with an optimizer": self._apply,
        }

    def _weights(self) -> sb.Budget:
        return sb.Budget(fraction=0.1)

    def _step(self, name: str, make: Callable[[], Policy]) -> None:
        policy = self.policies[name] = make()
        policy.step()

    def _velocity(self, budget: sb.Budget | None = None) -> Policy:
        """One that has measured before: its next step goes by velocity."""
        policy = sb.VelocityPolicy(self.model, budget or self._weights(), probe=self.images)
        policy.meter = networks.DrawnMeter()  # type: ignore[assignment]
        policy.steps = 1
        return policy

    def _velocity_bytes(self) -> None:
        self._velocity(self.bytes).step()

    def _neq(self) -> Policy:
        policy = sb.NEqPolicy(self.model, probe=self.images, top=0.1)
        policy.meter = networks.DrawnMeter()
        policy.steps = 1
        return policy

    def _trady(self) -> Policy:
        names = list(sb.layers(self.model))
        return sb.TraDyPolicy(self.model, self._weights(), axis="out", top_layers=names[::2])

    def _sparse_update(self) -> Policy:
        scheme = networks.half_scheme(self.model)
        return sb.SparseUpdatePolicy(self.model, scheme, axis="out", criterion="random")

    def _apply(self) -> None:
        """Exchange the selection for one of half of it, and back, with an optimizer that follows both times."""
        whole = self.policies["random"].selection
        assert whole is not None
        half = {name: torch.as_tensor(channels.index)[::2] for name, channels in whole.items()}
        sb.apply(self.model, whole, self.optimizer)
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(sb.trainable_parameters(self.model), lr=0.0, momentum=0.9)
        sb.apply(self.model, half, self.optimizer)
        sb.apply(self.model, whole, self.optimizer)

    def _state(self) -> None:
        for name in ("random", "velocity"):
            policy = self.policies[name]
            assert policy.selection is not None
            policy.state_dict(), policy.selection.to_dict()

    def _predict(self) -> int:
        return predict(self.model, None, self.images, loss=example_loss).peak

    def _restore(self) -> None:
        sb.restore(self.model)

    def _prepare_bytes(self) -> None:
        sb.convert(self.model)
        full = sb.Selection({name: sb.Channels(None) for name in sb.layers(self.model)})
        least, most = (
            predict(self.model, selection, self.images, loss=example_loss).needed
            for selection in (sb.Selection(), full)
        )
        # What the policies hold of every channel is part of the budget, too.
        held = sum(layer.num_channels() for layer in sb.layers(self.model).values()) * 128
        self.bytes = sb.Budget(bytes=(least + most) // 2 + held, batch=self.images)

    def _prepare_velocity(self) -> None:
        sb.convert(self.model)
        self._step("random", lambda: sb.RandomPolicy(self.model, self._weights()))
        self.images.normal_()
        self._step("velocity", lambda: sb.VelocityPolicy(self.model, self._weights(), probe=self.images))
        self._apply()

    @torch.no_grad()
    def _forward(self) -> None:
        self.model(self.images)


@dataclass(frozen=True)
class Plan:
    """Lives of networks of rising size. `made`: from a size to a network; `parts`: what is timed of its life."""

    label: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    made: Callable[[int], Life]
    parts: Callable[[Life], Parts]
    rounds: int


def _on_cpu(weights: int) -> Life:
    width, blocks = networks.of_weights(weights)
    return Life(networks.network(networks.CLASSES, width, blocks).eval(), 16)


PLANS = {
    "weights": Plan("weights of the network", (10**4, 10**5, 10**6, 10**7, 10**8, 10**9), (10**4, 10**5, 10**6),
                    lambda n: Life(networks.on_meta(*networks.of_weights(n)), 8), Life.planning, 5),
    "layers": Plan("convolutions", (16, 32, 64, 128, 256, 512, 1024), (4, 8, 16),
                   lambda n: Life(networks.on_meta(8, n - 1), 4), Life.choosing, 9),
    "channels": Plan("channels of the network", (1200, 12_000, 120_000, 1_200_000), (12, 120, 1200),
                     lambda n: Life(networks.on_meta(n // 12, 11, kernel=1), 4), Life.choosing, 5),
    "bytes": Plan("convolutions", (8, 16, 32, 64, 128, 256), (3, 4, 6),
                  lambda n: Life(networks.on_meta(8, n - 1), 4), Life.budgets, 1),
    "velocity": Plan("weights of the network", (10**4, 10**5, 10**6, 10**7), (10**3, 10**4, 10**5),
                     _on_cpu, Life.measuring, 7),
}  # fmt: skip
UNSORTED = (
    "convert", "full", "frozen", "sparse update", "trainable_parameters", "state_dict", "predict", "restore", WALK,
    "forward of the probe",
)  # fmt: skip


def run(plan: Plan, quick: bool) -> Json:
    """Time the lives in interleaved rounds; the first, in which operators are measured and classes read, is dropped.

    What is fitted is the 20th percentile: single calls of a few milliseconds, which a busy machine only lengthens.
    Garbage is collected between lives, not within, as `timeit` does.
    """
    values, meter = plan.quick if quick else plan.values, Meter(1)
    samples: dict[str, list[list[float]]] = {}
    for number in range(1 if quick else plan.rounds + 1):
        for place, n in enumerate(values):
            parts = plan.parts(plan.made(n))
            gc.collect()
            gc.disable()
            try:
                times = meter.round({n: parts}, cold=False)[n]
            finally:
                gc.enable()
            for name, ms in times.items():
                taken = samples.setdefault(name, [[] for _ in values])
                if quick or number:
                    taken[place].append(ms)
    samples.pop("", None)
    rows = {name: [quantiles(taken) for taken in lists] for name, lists in samples.items()}
    found = _fitted(values, rows)
    return {"label": plan.label, "x": list(values), "times": rows, "fits": found}


def _fitted(values: tuple[int, ...], rows: Mapping[str, list[list[float]]]) -> Json:
    """Exponents, and up to which they pass: where PyTorch's own walk grows faster than the layers, by as much more.

    The objects of a large network leave the processor's cache, which makes every visit dearer.
    """
    fits = {name: power(values, [row[0] for row in times]) for name, times in rows.items()}
    cache = max(fits[WALK].exponent - 1, 0.0) if WALK in fits else 0.0
    found = {}
    for name, fit in fits.items():
        limit = round((LINEAR if name in UNSORTED else SORTING) + cache, 2)
        found[name] = {**fit.__dict__, "limit": limit, "ok": fit.within(limit)}
    return found
