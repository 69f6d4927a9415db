"""Floating-point operations of a backward pass, as a selection makes them: two per multiplication and addition.

    weight gradient of k channels   2 k w P     w: weights of a channel, P: images x positions of the output
    dx                              2 W P       W: weights of the layer; where anything before it is trained

Convolutions and linear layers count, swapped or not; norms, activations and pooling do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.memory.simulate import call, fake_copy, fake_inputs, simulation
from sparse_bwd.nn import SparseLayer
from sparse_bwd.selection.apply import apply


def backward_flops(model: nn.Module, selection: Any, batch: Any) -> dict[str, int]:
    """Operations of backward per layer, by name; layers without any are absent. The model stays as it is.

    Args:
        selection: a Selection or a plain mapping; None = what is applied now.
        batch: the model's input, or a tuple, list or mapping of inputs; only shapes matter.
    """
    fake, mode = fake_copy(model)
    if selection is not None:
        apply(fake, selection)
    found: dict[str, int] = {}

    def count(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        positions = layer.positions(x, y) if isinstance(layer, SparseLayer) else y.numel() // weight.shape[0]
        trained = _trained_weights(layer, weight)
        operations = 2 * positions * (trained + (weight.numel() if x.requires_grad else 0))
        if operations:
            found[name] = found.get(name, 0) + operations

    handles = [
        layer.register_forward_hook(_reader(name, count), with_kwargs=True)
        for name, layer in fake.named_modules()
        if isinstance(layer, SparseLayer | nn.Conv2d | nn.Linear)
    ]
    with simulation(mode), torch.enable_grad():
        call(fake, fake_inputs(batch, mode))
    for handle in handles:
        handle.remove()
    return found


def _reader(name: str, count: Any) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        count(name, layer, args[0] if args else next(iter(kwargs.values())), output)

    return hook


def _trained_weights(layer: nn.Module, weight: Tensor) -> int:
    """Weights of the layer that get a gradient."""
    if isinstance(layer, SparseLayer):
        trained = layer._parameters["trainable_weight"]
        return 0 if trained is None else trained.numel()
    return weight.numel() if weight.requires_grad else 0
