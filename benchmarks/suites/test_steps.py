"""Whole training steps of networks beside dense ones: forward, loss, backward and update, batch 16 at 128x128, fp32.

One group per network. Its denominator is a step of plain PyTorch that trains all weights but the norms'. Velocity and
`apply` run between steps and have no counterpart in PyTorch; their ratio to the same dense step says how many steps
they cost. `velocity` measures 8 images, chooses 10 % and applies it; `apply` goes from 10 % on axis "out" to "in" and
back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

import sparse_bwd as sb
from benchmarks import stock
from benchmarks.step import SMALL
from benchmarks.suites.interleaved import Run, Timer
from sparse_bwd.measure.kernels import precision
from sparse_bwd.measure.selections import share_of_channels
from sparse_bwd.measure.step import LAYOUTS, Setting, dense, ours
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.memory import peak_bytes, saved_bytes

Network = str | Callable[[int], Any]
NETWORKS: dict[str, Network] = {
    "mobilenet_v2": stock.mobilenet_v2,
    "resnet18": stock.resnet18,
    "mobilenet_v2_035": SMALL,
}
FRACTION, ROUNDS, PROBE = 0.1, 10, 8
# Fraction of the channels, axis, and of how many last convolutions.
SELECTIONS: dict[str, tuple[float, str, int | None]] = {
    "out 10 %": (FRACTION, "out", None),
    "in 10 %": (FRACTION, "in", None),
    "last ten 30 %": (0.3, "out", 10),
    "frozen": (FRACTION, "out", 0),
}


def setting_of(network: Network, timer: Timer) -> Setting:
    batch, size = (2, 32) if timer.tiny else (16, 128)
    return Setting(network, batch, size, device=timer.device)


@cache
def dense_steps(setting: Setting) -> dict[str, TrainingStep]:
    """Of one network in both layouts, for all of its rows."""
    variants = {layout: dense(setting, layout) for layout in LAYOUTS}
    return {layout: TrainingStep(variant, variant.model) for layout, variant in variants.items()}


def sparse_step(setting: Setting, fraction: float, axis: str, last: int | None) -> TrainingStep:
    variant = ours(setting, "channels_last", fraction, axis, last)
    return TrainingStep(variant, variant.model)


def bytes_of(training: TrainingStep) -> dict[str, int]:
    """Kept from forward to backward, and the peak of a step, after the first, which makes the optimizer's state."""
    training.step()
    saved = saved_bytes(training.loss, training.variant.model)
    return {"saved": saved, "peak": peak_bytes(training.step, training.variant.x.device).peak}


def time_step(timer: Timer, name: str, setting: Setting, run: Run | None, found: dict[str, int]) -> None:
    steps = {layout: training.step for layout, training in dense_steps(setting).items()}
    about = {"shape": f"{setting.size}x{setting.size}", "batch": setting.batch, "dtype": "fp32", **found}
    timer.time(f"step {name}", steps, run, {**about, "layout": "channels_last"}, ROUNDS, cold=False)


@pytest.mark.parametrize("network", NETWORKS)
def test_dense(network: str, timer: Timer) -> None:
    """Its bytes are those in channels_last, where PyTorch reorders nothing."""
    setting = setting_of(NETWORKS[network], timer)
    with precision("fp32"):
        time_step(timer, network, setting, None, bytes_of(dense_steps(setting)["channels_last"]))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_step(network: str, selection: str, timer: Timer) -> None:
    setting = setting_of(NETWORKS[network], timer)
    with precision("fp32"):
        training = sparse_step(setting, *SELECTIONS[selection])
        time_step(timer, network, setting, training.step, bytes_of(training))


@pytest.mark.parametrize("network", NETWORKS)
def test_velocity(network: str, timer: Timer) -> None:
    setting = setting_of(NETWORKS[network], timer)
    training = sparse_step(setting, *SELECTIONS["out 10 %"])
    model, probe = training.variant.model, training.variant.x[:PROBE]
    policy = sb.VelocityPolicy(model, sb.Budget(fraction=FRACTION), probe=probe)
    policy.step(training.optimizer)
    run = partial(policy.step, training.optimizer)
    with precision("fp32"):
        time_step(timer, network, setting, run, {"peak": peak_bytes(run, timer.device).peak})


@pytest.mark.parametrize("network", NETWORKS)
def test_apply(network: str, timer: Timer) -> None:
    setting = setting_of(NETWORKS[network], timer)
    training = sparse_step(setting, *SELECTIONS["out 10 %"])
    training.step()
    model = training.variant.model
    there, back = (share_of_channels(model, FRACTION, axis) for axis in ("in", "out"))

    def run() -> None:
        for selection in (there, back):
            sb.apply(model, selection, training.optimizer)

    with precision("fp32"):
        time_step(timer, network, setting, run, {"peak": peak_bytes(run, timer.device).peak})
