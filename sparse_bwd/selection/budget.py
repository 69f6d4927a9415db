"""The most that a selection may cost."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

UNITS = ("params", "fraction", "bytes", "flops")
MIB = 2**20
GIGA = 1e9


def _check_amount(name: str, value: Any, whole: bool) -> None:
    """ValueError unless `value` is a finite number >= 0 (a whole one if `whole`); TypeError if it is no number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Budget {name} must be a number, got {value!r}.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"Budget {name} must be a finite number of at least 0, got {value!r}.")
    if whole and not float(value).is_integer():
        raise ValueError(
            f"Budget {name} must be a whole number, got {value!r}; a share is written fraction=."
        )


@dataclass(frozen=True)
class Budget:
    """The most a selection may cost: weights (`params` or `fraction`), or bytes, operations (`flops`) or both of these.

    Args:
        params: trained weights outside `always_train`. 0 selects nothing.
        fraction: share of all swapped weights outside `always_train`; the budget is int(total * fraction).
        bytes: of memory that a training step takes at most beyond the network's own parameters and buffers and the
            batch: everything kept for backward, gradients, optimizer state, compact parameters, what measuring velocity
            holds, and whatever else is alive at the highest moment. `always_train` counts.
        flops: floating-point operations of one backward pass through all convolutions and linear layers,
            `always_train` included: two per multiplication and addition.
        batch: what bytes and operations refer to: the model's input in a step (a tensor, a tuple or list of arguments,
            or a dict of keyword arguments), on the model's device and in its memory layout. Only shapes matter.
        optimizer: name of the optimizer of the steps, as in `memory.predict` ("sgd_momentum" unless given), or a
            function from parameters to an optimizer.
        loss: from the model's output to a scalar; None: cross-entropy where the output is [images, classes], else the
            sum.
    """

    params: int | None = None
    fraction: float | None = None
    bytes: int | None = None
    flops: float | None = None
    batch: Any = field(default=None, compare=False)
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    loss: Callable[[Any], Tensor] | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in UNITS if getattr(self, name) is not None}
        if len(given) != 1 and set(given) != {"bytes", "flops"}:
            named = ", ".join(given) if given else "none"
            raise ValueError(
                f"A budget has exactly one of params=, fraction=, bytes= and flops=, or the last two; got {named}."
            )
        for name, value in given.items():
            _check_amount(name, value, whole=name in ("params", "bytes"))
        if not self.of_steps and any(v is not None for v in (self.batch, self.optimizer, self.loss)):
            raise ValueError(
                "batch=, optimizer= and loss= describe a budget of bytes or operations; give them together with bytes= "
                "or flops=."
            )
        if self.fraction is not None and self.fraction > 1:
            warnings.warn(
                f"A budget of fraction={self.fraction} is more than all weights and selects everything; "
                f"{self.fraction} percent is written fraction={self.fraction / 100:g}.",
                stacklevel=3,
            )

    @property
    def of_steps(self) -> bool:
        """Whether the budget limits what a training step takes, rather than how many weights it trains."""
        return self.bytes is not None or self.flops is not None

    def weights(self, total: int) -> int:
        """The budget in trained weights, of a model whose swapped layers have `total`; ValueError for one of steps."""
        if self.params is not None:
            return int(self.params)
        if self.fraction is not None:
            return int(total * self.fraction)
        raise ValueError(f"A budget of {self} is not one of weights; use params= or fraction=.")

    def __str__(self) -> str:
        if self.params is not None:
            return f"{int(self.params):,} weights"
        if self.fraction is not None:
            return f"{self.fraction:.4g} of all weights"
        parts = []
        if self.bytes is not None:
            parts.append(
                f"{self.bytes:,} bytes" + (f" ({self.bytes / MIB:,.1f} MiB)" if self.bytes >= MIB else "")
            )
        if self.flops is not None:
            parts.append(f"{self.flops / GIGA:,.3f} GFLOPs of backward")
        return " and ".join(parts)
