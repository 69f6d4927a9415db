"""Masked training in plain PyTorch: the oracle of compact parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_depthwise(layer: Any) -> bool:
    """One input and one output channel per group: both axes are the same channels."""
    groups = getattr(layer, "groups", 1)
    return bool(groups > 1 and groups == layer.in_channels == layer.out_channels)


def compact(full: Tensor, layer: Any, index: list[int] | None, axis: str) -> Tensor:
    """The slices of a full weight-shaped tensor that belong to the selected channels.

    Axis "out": `[k, C_in/g, kh, kw]`; axis "in": `[C_out, k, kh, kw]`, with groups `[k, C_out/g, kh, kw]`.
    """
    groups = getattr(layer, "groups", 1)
    if axis == "out" or is_depthwise(layer):
        return full if index is None else full[index]
    if groups == 1:
        return full if index is None else full[:, index]
    width = full.shape[1]
    rows = full.unflatten(0, (groups, -1))
    channels = range(groups * width) if index is None else index
    return torch.stack([rows[c // width, :, c % width] for c in channels]) if channels else rows[:0, :, 0]


def trained_masks(
    model: nn.Module, selection: Mapping[str, Any], whole: Iterable[str] = ()
) -> dict[str, Tensor]:
    """For every parameter of a plain model, True where a selection trains it; of those named by `whole`, everywhere."""
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for name in whole:
        masks[name][...] = True
    for name, channels in selection.items():
        layer, weight, kept_bias = _stock(model, name)
        index = None if channels.index is None else channels.index.tolist()
        bias = masks.get(kept_bias)
        if isinstance(layer, nn.BatchNorm2d):
            assert bias is not None
            bias[slice(None) if index is None else index] = True
            continue
        mask = masks[weight]
        places = compact(torch.arange(mask.numel()).view(mask.shape), layer, index, channels.axis)
        mask.view(-1)[places.flatten()] = True
        if bias is not None and channels.bias != "none":
            bias[slice(None) if channels.bias == "all" or index is None else index] = True
    return masks


def _stock(model: nn.Module, name: str) -> tuple[Any, str, str]:
    """The plain module that a selection names, and the names of its weight and bias."""
    parent, _, last = name.rpartition(".")
    if last == "in_proj" and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        return model.get_submodule(parent), f"{name}_weight", f"{name}_bias"
    return model.get_submodule(name), f"{name}.weight", f"{name}.bias"


class MaskedTrainer:
    """Trains a plain model where the masks are True and nowhere else, with any optimizer."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.masks, self.optimizer = model, masks, optimizer
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def mask_gradients(self) -> None:
        """Zero the gradients of everything that is not trained; call between backward and clipping."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~self.masks[name], 0)

    def step(self) -> None:
        """One optimizer step; untrained values are put back, as weight decay moves them."""
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                start = self.start[name].to(parameter.dtype)
                parameter.copy_(torch.where(self.masks[name], parameter, start))
        self.optimizer.zero_grad()
