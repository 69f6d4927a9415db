"""Strategies of other libraries, where they are installed.

lora      peft's LoraModel on every convolution and linear layer but depthwise ones and the head, which is trained
          whole; the largest rank that the budget of weights pays for. The base weights are frozen.
memsave   memsave_torch's layers, which keep nothing for frozen layers; the last layers are trained whole
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparse_bwd.measure.bench.asked import Asked, Case
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
from sparse_bwd.measure.bench.partial import freeze_all_but_last, weight_budget
from sparse_bwd.measure.step import LAYOUTS, Variant
from sparse_bwd.training.errors import UserError

ADAPTER = "default"  # peft's name of the only adapter


def why_no(package: str) -> str:
    """Why a strategy cannot run; "" where its package is installed."""
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def lora(asked: Asked, case: Case, layout: str) -> Made:
    """Low-rank updates of frozen weights."""
    from peft import LoraConfig, inject_adapter_in_model

    variant = dense_variant(asked, layout)
    head = head_of(variant.model)
    targets = adapted(variant.model, head)
    rank = rank_within(targets, case)
    variant.model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), bias="none")
    inject_adapter_in_model(config, variant.model, ADAPTER)
    variant.model.eval()  # peft leaves its dropout, of probability 0, in training mode
    if head is not None:
        variant.model.get_submodule(head).requires_grad_(True)
    weights = sum(rank * (rows + columns) for rows, columns in map(_matrix, targets.values()))
    selection = {"layers": len(targets), "channels": 0, "weights": weights}
    variant.model.to(memory_format=LAYOUTS[layout])  # the factors of k x k convolutions too
    return Made(
        _of(asked, variant), _pairs(variant.model, list(targets), head), selection, extra={"rank": rank}
    )


def adapted(model: nn.Module, head: str | None) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers that get an adapter."""
    return {
        name: module
        for name, module in model.named_modules()
        if name != head and (type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1))
    }


def rank_within(layers: dict[str, nn.Conv2d | nn.Linear], case: Case) -> int:
    """The largest rank whose two factors fit the budget. UserError where not even rank 1 does."""
    per_rank = sum(rows + columns for rows, columns in map(_matrix, layers.values()))
    budget = weight_budget(case, sum(layer.weight.numel() for layer in layers.values()))
    if budget < per_rank:
        raise UserError(f"LoRA of rank 1 takes {per_rank:,} weights, and the budget is {budget:,}.")
    return budget // per_rank


def _matrix(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix."""
    return layer.weight.shape[0], layer.weight[0].numel()


def _of(asked: Asked, variant: Variant) -> Any:
    variant.model.to(asked.device)
    variant.expected_trained = sum(p.numel() for p in variant.model.parameters() if p.requires_grad)
    return step_of(asked, variant)


def _pairs(model: nn.Module, names: list[str], head: str | None) -> Any:
    """W + s B A with B = 0: dB = s dW A', dA = 0, and the head's gradients are those of dense."""

    def pairs(right: Gradients) -> Iterator[Pair]:
        for name in names:
            layer: Any = model.get_submodule(name)
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            dw = right[f"{name}.weight"].flatten(1)
            yield Pair(f"{name}.lora_B", b.grad.flatten(1), layer.scaling[ADAPTER] * dw @ a.flatten(1).T)
            yield Pair(f"{name}.lora_A", a.grad, torch.zeros_like(a))
        if head is not None:
            for name, parameter in model.get_submodule(head).named_parameters():
                assert parameter.grad is not None
                yield Pair(f"{head}.{name}", parameter.grad, right[f"{head}.{name}"])

    return pairs


def memsave(asked: Asked, case: Case, layout: str) -> Made:
    """Frozen layers that keep nothing."""
    from memsave_torch.nn import convert_to_memory_saving

    variant = dense_variant(asked, layout)
    freeze_all_but_last(variant.model, case)
    selection = trained_layers(variant.model)
    variant.model = convert_to_memory_saving(variant.model, verbose=False)
    return Made(_of(asked, variant), as_dense(variant.model), selection)
