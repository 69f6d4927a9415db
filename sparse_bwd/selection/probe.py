"""The probe: the few inputs on which velocity is measured, and the pass over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_bwd.memory.simulate import map_tensors

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
