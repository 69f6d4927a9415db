"""Masked training in plain PyTorch: the oracle of compact parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases import compact


def trained_masks(model: nn.Module, selection: Mapping[str, Any]) -> dict[str, Tensor]:
    """For every parameter of a plain model, True where a selection trains it."""
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for name, channels in selection.items():
        layer: Any = model.get_submodule(name)
        index = None if channels.index is None else channels.index.tolist()
        bias = masks.get(f"{name}.bias")
        if isinstance(layer, nn.BatchNorm2d):
            assert bias is not None
            bias[slice(None) if index is None else index] = True
            continue
        mask = masks[f"{name}.weight"]
        places = compact(torch.arange(mask.numel()).view(mask.shape), layer, index, channels.axis)
        mask.view(-1)[places.flatten()] = True
        if bias is not None and channels.bias != "none":
            bias[slice(None) if channels.bias == "all" or index is None else index] = True
    return masks


class MaskedTrainer:
    """Trains a plain model where the masks are True and nowhere else, with any optimizer."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.masks, self.optimizer = model, masks, optimizer
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def mask_gradients(self) -> None:
        """Zero the gradients of everything that is not trained; call between backward and clipping."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad[~self.masks[name]] = 0

    def step(self) -> None:
        """One optimizer step; untrained values are put back, as weight decay moves them."""
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter[~self.masks[name]] = self.start[name].to(parameter.dtype)[~self.masks[name]]
        self.optimizer.zero_grad()
