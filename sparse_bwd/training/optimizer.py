"""The optimizer of a recipe."""

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.training.recipe import Recipe


def make_optimizer(recipe: Recipe, model: nn.Module, lr: float | None = None) -> torch.optim.Optimizer:
    """The optimizer of `recipe` over what `model` trains now, at `lr` in place of the recipe's where that is given."""
    rate = recipe.lr if lr is None else lr
    parameters = sb.trainable_parameters(model)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, lr=rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
