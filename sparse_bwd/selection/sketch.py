"""Velocity in constant memory: r numbers per channel instead of its responses.

With u_t the responses of a channel at measurement t, each of the N samples divided by its norm, one behind the other:

    phi_t = 1 - |u_t - u_{t-1}|^2 / (2 N)          since every sample has norm 1, and |a - b|^2 = 2 (1 - cos)
    s_t = S u_t,  E |s_t - s_{t-1}|^2 = |u_t - u_{t-1}|^2      S: random signs, one matrix for all t (`ops/sketch.py`)

so that what is measured is 1 - |s_t - s_{t-1}|^2 / (2 N). Why not <s_t, s_{t-1}> / N, which has the same expectation:
its error is about r^-1/2 whatever phi is, while velocity lives on 1 - phi, which is far smaller in fine-tuning. The
difference has an error of sqrt(2 / r) of 1 - phi itself, which is the least that any estimate from r random
projections has as phi goes to 1. What has not moved gives exactly phi = 1.

Zero responses (METHOD 1.1) need no flags besides: u has one more value per sample, 1 where the response is zero. Two
zero responses are equal (similarity 1), a zero and a non-zero one are perpendicular (similarity 0).

Bytes: r numbers in the storage dtype per channel, whatever the size and number of the images and of the calls of a
layer; and what they stand for, the shape of every response, as plain integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.ops import response_sketch
from sparse_bwd.selection.responses import (
    Meter,
    changed_shape,
    check_kind,
    check_storage,
    dtype_name,
    foreign,
    nan_unless,
    on_the_host,
)

# The fewest whose selections overlap with exact ones as much as those of two probes of 10 images do:
# benchmarks/results/velocity.md.
NUMBERS = 16


class SketchMeter(Meter):
    """Keeps a sketch of the last responses of a model's layers to the probe and compares new ones with it.

    Args:
        numbers: r, per channel.
        storage: dtype of what is kept. Its rounding moves the root of 1 - phi by less than about 7e-4 (float16) or 6e-3
            (bfloat16).
        seed: of the signs.
    """

    def __init__(self, numbers: int = NUMBERS, storage: torch.dtype = torch.float16, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(numbers, int) or numbers < 1:
            raise ValueError(f"numbers is {numbers!r}; a channel needs a whole number of them, at least 1.")
        self.numbers, self.storage, self.seed = numbers, check_storage(storage), seed
        self.kept: dict[str, Tensor] = {}
        self.shapes: dict[str, list[list[int]]] = {}  # of the responses behind a sketch, call by call
        self._sums: dict[str, Tensor] = {}
        self._seen: dict[str, list[list[int]]] = {}

    @property
    def bytes(self) -> int:
        return sum(kept.numel() * kept.element_size() for kept in self.kept.values())

    def _begin(self) -> None:
        self._sums, self._seen = {}, {}

    def _take(self, name: str, call: int, new: Tensor) -> None:
        seen = self._seen.setdefault(name, [])
        if name not in self._sums:
            self._sums[name] = torch.zeros(new.shape[1], self.numbers, dtype=torch.float64, device=new.device)
        before = self.shapes.get(name)
        if before is not None and before[call : call + 1] != [list(new.shape)]:
            raise changed_shape(name, new.shape, before[call] if call < len(before) else ())
        self._project(new, self._sums[name], sum(_length(shape) for shape in seen))
        seen.append(list(new.shape))

    def _project(self, new: Tensor, sums: Tensor, start: int) -> None:
        """Add the sketch of one response to `sums`; it goes on at place `start` of the vector that is sketched."""
        response_sketch(new, sums, self.seed, start)

    def _finish(self, channels: Mapping[str, int]) -> dict[str, Tensor]:
        sums, self._sums = self._sums, {}
        phi = {name: torch.ones(count, dtype=torch.float64) for name, count in channels.items()}
        kept = {name: values.to(self.storage) for name, values in sums.items()}
        for name, now in kept.items():
            similar = torch.ones_like(now[:, 0], dtype=torch.float64)
            if name in self.kept:
                samples = sum(shape[0] for shape in self._seen[name])
                similar = self._similarity(now, self.kept[name].to(now.device, non_blocking=True), samples)
            phi[name] = nan_unless(now.isfinite().all(1), similar)
        found = on_the_host(phi)
        self.kept |= kept
        self.shapes |= self._seen
        return found

    def _similarity(self, now: Tensor, before: Tensor, samples: int) -> Tensor:
        """Estimate of phi [C], from the sketches [C, r] of now and of the measurement before."""
        return 1 - (now.double() - before.double()).square_().sum(1) / (2 * samples)

    def _settings(self) -> dict[str, Any]:
        return {"measure": "sketch", "storage": dtype_name(self.storage), "numbers": self.numbers}

    def state_dict(self) -> dict[str, Any]:
        kept = {name: held.to("cpu", copy=True) for name, held in self.kept.items()}
        shapes = {name: [list(shape) for shape in calls] for name, calls in self.shapes.items()}
        return {**self._settings(), "seed": self.seed, "kept": kept, "shapes": shapes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seed = state["seed"]
        self.kept = {name: held.clone() for name, held in state["kept"].items()}
        self.shapes = {name: [list(shape) for shape in calls] for name, calls in state["shapes"].items()}

    def check_state(self, state: Any, channels: Mapping[str, int]) -> None:
        check_kind(state, self._settings())
        shapes = state.get("shapes")
        if not isinstance(state.get("seed"), int) or not isinstance(shapes, Mapping):
            raise ValueError(
                "The saved velocity has no seed or no shapes of the responses that were measured."
            )
        for name, held in state["kept"].items():
            right = name in channels and name in shapes and isinstance(held, Tensor)
            if not right or held.shape != (channels[name], self.numbers) or held.dtype != self.storage:
                raise foreign(name)


def _length(shape: list[int]) -> int:
    """Places that a response [N, C, *] takes in the vector that is sketched: its values and one more per sample."""
    places = 1
    for size in shape[2:]:
        places *= size
    return shape[0] * (places + 1)
