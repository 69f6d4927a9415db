"""What every strategy hands out: a training step, and how its gradients should look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_bwd.measure.bench.asked import Asked
from sparse_bwd.measure.step import Setting, Variant, dense
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.training.models import head_name

Gradients = dict[str, Tensor]  # of a plain network, by the names of its parameters


class Pair(NamedTuple):
    """A gradient, and what it should be."""

    name: str
    found: Tensor
    right: Tensor


@dataclass
class Made:
    """A case ready to be measured.

    Attributes:
        pairs: from the gradients of dense PyTorch on the same weights and batch, what the gradients of this case
            should be; asked after a backward, before the optimizer.
        selection: what is trained in words for the row: layers, channels, weights.
        hidden: what is kept for backward does not pass through autograd's hooks (compiled graphs, checkpoints).
        extra: further columns of the row.
    """

    step: TrainingStep
    pairs: Callable[[Gradients], Iterator[Pair]]
    selection: dict[str, int] = field(default_factory=dict)
    hidden: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def setting_of(asked: Asked) -> Setting:
    """For the builders of `measure/step.py`."""
    return Setting(
        asked.model, asked.batch, asked.size, asked.classes, asked.device, asked.seed, asked.batch_norm
    )


def step_of(
    asked: Asked, variant: Variant, forward: Callable[[Tensor], Tensor] | None = None
) -> TrainingStep:
    """A step on batches that take turns where there is a cache that they could stay in."""
    copies = 2 if torch.device(asked.device).type == "cuda" else 1
    run = (
        variant.model if forward is None else forward
    )  # a compiled model says that it has a length, and has none
    return TrainingStep(variant, run, asked.dtype, asked.optimizer, copies=copies)


def dense_variant(asked: Asked, layout: str) -> Variant:
    """Plain PyTorch: everything trained but norms in mode "frozen"."""
    return dense(setting_of(asked), layout)


def as_dense(model: nn.Module) -> Callable[[Gradients], Iterator[Pair]]:
    """Pairs for a network whose trained parameters have the names and gradients of the dense one's."""

    def pairs(right: Gradients) -> Iterator[Pair]:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} is trained but got no gradient"
                yield Pair(name, parameter.grad, right[name])

    return pairs


def head_of(model: nn.Module) -> str | None:
    """The classifier, which is trained whole in every strategy and counts in no budget of weights."""
    return head_name(model)


def trained_layers(model: nn.Module) -> dict[str, int]:
    """Layers of a plain network whose weight is trained whole, but its head: their number, channels and weights."""
    head = head_of(model)
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != head and module.weight.requires_grad
    ]
    return {
        "layers": len(weights),
        "channels": sum(weight.shape[0] for weight in weights),
        "weights": sum(weight.numel() for weight in weights),
    }
