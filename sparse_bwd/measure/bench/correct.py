"""Before a case is timed: its loss and gradients beside those of dense PyTorch on the same weights and batch.

    |found - right| <= TOLERANCE (|right| + 1e-6 |all of the gradient|)        norms of each parameter

A tolerance is what another order of additions in this precision changes over a deep network; a gradient of something
else is as far away as it is long. The second term is for layers whose gradient is all but zero beside the others.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparse_bwd.measure.bench.made import Gradients, Made, Pair
from sparse_bwd.measure.training_step import TrainingStep

TOLERANCE = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 2e-1, "fp16": 3e-2}
FLOOR = 1e-6


class Wrong(AssertionError):
    """A strategy computes something else than dense PyTorch."""


def gradients_of(step: TrainingStep, images: int | None = None) -> tuple[float, Gradients]:
    """Loss and gradients of a plain network, by the names of its parameters, on the first `images` or all."""
    loss = _backward(step, images)
    found = {
        name: parameter.grad
        for name, parameter in step.variant.model.named_parameters()
        if parameter.grad is not None
    }
    step.variant.clear()
    return loss, found


def check(made: Made, right: tuple[float, Gradients], images: int | None = None) -> int:
    """Compare with what `gradients_of` gave for as many images; the number of gradients that agree.

    Raises:
        Wrong: a gradient or the loss is another one, or not finite, or nothing is trained.
    """
    loss = _backward(made.step, images)
    tolerance = TOLERANCE[made.step.dtype]
    if not abs(loss - right[0]) <= tolerance * abs(right[0]):
        raise Wrong(f"The loss is {loss:.6g}, and dense PyTorch's is {right[0]:.6g}.")
    whole = _norm(right[1].values())
    pairs = list(made.pairs(right[1]))
    for pair in pairs:
        _compare(pair, tolerance, FLOOR * whole)
    made.step.variant.clear()
    if not pairs:
        raise Wrong("Nothing is trained.")
    return len(pairs)


def _backward(step: TrainingStep, images: int | None) -> float:
    """One forward and backward without scaling; the loss. Gradients stay."""
    step.variant.clear()
    loss = step.loss(images)
    loss.backward()
    if step.after_backward is not None:
        step.after_backward()
    return loss.item()


def _compare(pair: Pair, tolerance: float, floor: float) -> None:
    if pair.found.shape != pair.right.shape:
        raise Wrong(
            f"{pair.name}: a gradient {list(pair.found.shape)} where {list(pair.right.shape)} is expected."
        )
    right = _norm([pair.right])
    error = _norm([pair.found.float() - pair.right.float()])
    if not error <= tolerance * right + floor:
        raise Wrong(
            f"{pair.name}: the gradient is {error:.3g} away from dense PyTorch's, of norm {right:.3g}."
        )


def _norm(tensors: Iterable[Tensor]) -> float:
    """Of all values together, in float64."""
    squares = [torch.linalg.vector_norm(each, dtype=torch.float64) ** 2 for each in tensors]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0
