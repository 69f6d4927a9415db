"""The most that a selection may cost."""

from __future__ import annotations

import math
import numbers
import warnings
from dataclasses import dataclass
from typing import Any


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
    """The most a selection may cost, in exactly one of three units.

    Args:
        params: trained weights outside `always_train`. 0 selects nothing.
        fraction: share of all swapped weights outside `always_train`; the budget is int(total * fraction).
        bytes: bytes of memory. The policies that rank by weights refuse it.
        batch, optimizer: what a byte budget refers to (example inputs, name of the optimizer); only with `bytes`.
    """

    params: int | None = None
    fraction: float | None = None
    bytes: int | None = None
    batch: Any = None
    optimizer: str | None = None

    def __post_init__(self) -> None:
        given = {
            name: getattr(self, name)
            for name in ("params", "fraction", "bytes")
            if getattr(self, name) is not None
        }
        if len(given) != 1:
            named = ", ".join(given) if given else "none"
            raise ValueError(f"A budget has exactly one of params=, fraction= and bytes=; got {named}.")
        for name, value in given.items():
            _check_amount(name, value, whole=name != "fraction")
        if self.bytes is None and (self.batch is not None or self.optimizer is not None):
            raise ValueError("batch= and optimizer= describe a byte budget; give them together with bytes=.")
        if self.fraction is not None and self.fraction > 1:
            warnings.warn(
                f"A budget of fraction={self.fraction} is more than all weights and selects everything; "
                f"{self.fraction} percent is written fraction={self.fraction / 100:g}.",
                stacklevel=3,
            )

    def weights(self, total: int) -> int:
        """The budget in trained weights, of a model whose swapped layers have `total`; ValueError for a byte budget."""
        if self.params is not None:
            return int(self.params)
        if self.fraction is not None:
            return int(total * self.fraction)
        raise ValueError(
            "Byte budgets are not supported by this policy yet, which counts trained weights; use params= or fraction=."
        )

    def __str__(self) -> str:
        if self.params is not None:
            return f"{int(self.params):,} weights"
        if self.fraction is not None:
            return f"{self.fraction:.4g} of all weights"
        return f"{self.bytes:,} bytes"
