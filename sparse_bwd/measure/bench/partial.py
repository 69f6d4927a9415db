"""Strategies of others that train a part of the weights, in our own short implementations.

frozen-layers   the last layers whole, the rest with requires_grad=False: the usual fine-tuning
masked          backward of every weight, then rows outside the selection set to zero: what the paper's code does
whole-layers    layers drawn at random, whole, the rest skipped; in our lean layers, without a choice of channels
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.measure.bench.asked import Asked, Case, amount
from sparse_bwd.measure.bench.made import (
    Gradients,
    Made,
    Pair,
    as_dense,
    dense_variant,
    head_of,
    step_of,
    trained_layers,
)
from sparse_bwd.measure.bench.ours import converted, finish
from sparse_bwd.training.errors import UserError


def weight_budget(case: Case, total: int) -> int:
    """The budget as a number of weights."""
    given = amount(case.budget)
    if not {"fraction", "params"} & set(given):
        raise UserError(
            f"The strategy {case.strategy} spends weights, and '{case.budget}' is no number of them."
        )
    return sb.Budget(**given).weights(total)  # type: ignore[arg-type]


def frozen_layers(asked: Asked, case: Case, layout: str) -> Made:
    """The head, and the last layers that the budget pays for, whole; a layer that does not fit is left out."""
    variant = dense_variant(asked, layout)
    freeze_all_but_last(variant.model, case)
    return Made(step_of(asked, variant), as_dense(variant.model), trained_layers(variant.model))


def freeze_all_but_last(model: nn.Module, case: Case) -> None:
    """Only the head and the last layers that the budget pays for are trained."""
    head = head_of(model)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != head
    ]
    left = weight_budget(case, sum(layer.weight.numel() for layer in layers))
    model.requires_grad_(False)
    for layer in reversed(layers):
        if layer.weight.numel() <= left:
            left -= layer.weight.numel()
            layer.weight.requires_grad_(True)
    if head is not None:
        model.get_submodule(head).requires_grad_(True)


def masked(asked: Asked, case: Case, layout: str) -> Made:
    """Gradients of all weights, of which rows drawn at random within the budget stay."""
    shadow = converted(asked, layout)
    policy = sb.RandomPolicy(shadow, sb.Budget(**amount(case.budget)), seed=asked.seed)  # type: ignore[arg-type]
    policy.step()
    kept = {name: layer.channels for name, layer in sb.layers(shadow).items() if layer.selectable}
    variant = dense_variant(asked, layout)
    masks = {f"{name}.weight": _mask(variant.model, name, channels) for name, channels in kept.items()}

    def zero() -> None:
        for name, parameter in variant.model.named_parameters():
            if name in masks and parameter.grad is not None:
                parameter.grad[masks[name]] = 0.0

    def pairs(right: Gradients) -> Iterator[Pair]:
        for pair in as_dense(variant.model)(right):
            if pair.name in masks:
                expected = pair.right.clone()
                expected[masks[pair.name]] = 0.0
                pair = pair._replace(right=expected)
            yield pair

    step = step_of(asked, variant)
    step.after_backward = zero
    report = policy.report
    assert report is not None
    selection = {"layers": report.layers, "channels": report.channels, "weights": report.cost}
    return Made(step, pairs, selection)


def _mask(model: nn.Module, name: str, channels: torch.Tensor | None) -> torch.Tensor:
    """bool [C_out]: rows that are not trained."""
    weight = model.get_parameter(f"{name}.weight")
    mask = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    if channels is None:
        return torch.zeros_like(mask)
    mask[channels.to(weight.device)] = False
    return mask


def whole_layers(asked: Asked, case: Case, layout: str) -> Made:
    """Layers in a random order, each whole, as long as the budget pays for it."""
    model = converted(asked, layout)
    layers = {name: layer for name, layer in sb.layers(model).items() if layer.selectable}
    left = weight_budget(case, sum(layer.weight.numel() for layer in layers.values()))
    names, chosen = list(layers), {}
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(asked.seed))
    for name in (names[place] for place in order.tolist()):
        if layers[name].weight.numel() <= left:
            left -= layers[name].weight.numel()
            chosen[name] = sb.Channels(None)
    sb.apply(model, sb.Selection(chosen))
    return finish(asked, model, layout)
