"""Strategies that train every weight: dense PyTorch, with checkpoints, and compiled."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_bwd.measure.bench.asked import Asked, Case
from sparse_bwd.measure.bench.made import Made, as_dense, dense_variant, step_of, trained_layers

MEMORY_BUDGET = 0.5  # of what a compiled graph would keep at most: the partitioner recomputes the rest


def dense_step(asked: Asked, case: Case, layout: str) -> Made:
    """Plain PyTorch."""
    variant = dense_variant(asked, layout)
    return Made(step_of(asked, variant), as_dense(variant.model), trained_layers(variant.model))


def checkpointed(asked: Asked, case: Case, layout: str) -> Made:
    """Plain PyTorch that keeps the inputs of its blocks and computes the rest again in backward."""
    variant = dense_variant(asked, layout)
    for block in blocks(variant.model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    selection = trained_layers(variant.model)
    return Made(step_of(asked, variant), as_dense(variant.model), selection, hidden=True)


def blocks(model: nn.Module) -> list[nn.Module]:
    """What checkpoints enclose: the members of the outermost lists of modules that have parts themselves."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            members = [member for member in child if any(True for _ in member.children())]
            if members:
                found += members
                continue
        found += blocks(child)
    return found


def compiled(asked: Asked, case: Case, layout: str) -> Made:
    """Plain PyTorch through torch.compile."""
    variant = dense_variant(asked, layout)
    step = step_of(asked, variant, torch.compile(variant.model))
    return Made(step, as_dense(variant.model), trained_layers(variant.model), hidden=True)


def compiled_lean(asked: Asked, case: Case, layout: str) -> Made:
    """The same with half of the activation memory: torch.compile computes cheap values again in backward."""
    from torch._functorch import config

    config.activation_memory_budget = MEMORY_BUDGET  # for the process, which this case has for itself
    return compiled(asked, case, layout)
