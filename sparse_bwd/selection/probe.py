"""The probe: the few inputs on which velocity is measured, and the pass over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Noise is drawn on a grid of so many points a side: what neighbouring pixels of photographs share.
GRID = 8


def noise_images(count: int, size: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Images of random noise [count, channels, size, size] in [0, 1], for a probe that needs no data.

    Uniform values on a coarse grid, enlarged bilinearly: responses to white noise resemble those to photographs less.
    Normalise them as the model's inputs are: `(noise_images(10, 224) - mean) / std`.
    """
    if min(count, size, channels) < 1:
        raise ValueError(
            f"Noise of {count} images, {channels} x {size} x {size}, is empty; give positive sizes."
        )
    grid = torch.rand(count, channels, GRID, GRID, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(grid, size=(size, size), mode="bilinear")


def map_tensors(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """Apply `function` to the tensors of a probe (a tensor, or a tuple, list or mapping of inputs)."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(value, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)([map_tensors(value, function) for value in inputs])
    return inputs


def check_probe(probe: Any) -> Any:
    """Return `probe`; TypeError or ValueError if it holds no tensor or an empty one."""
    if not isinstance(probe, (Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"probe must be a tensor or a tuple, list or dict of model inputs, got {type(probe).__name__}."
        )
    shapes: list[torch.Size] = []
    map_tensors(probe, lambda tensor: shapes.append(tensor.shape))
    if not shapes or any(shape.numel() == 0 for shape in shapes):
        raise ValueError(
            f"The probe is empty (shapes {[tuple(shape) for shape in shapes]}); give it a few images."
        )
    return probe


def call(model: nn.Module, inputs: Any) -> Any:
    """Forward of `model`: a tensor is its input, a tuple or list its arguments, a mapping its keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode inside; afterwards every module has the flag it had, also where they differed."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        model.train(flags[0][1])  # lets a train() of the user's own run, before the flags are set one by one
        for module, training in flags:
            module.training = training
