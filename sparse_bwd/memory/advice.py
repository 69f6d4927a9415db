"""Words of `explain`: what would make a layer let go of what it keeps, and why a layer stays dense."""

from collections.abc import Iterable

import torch
from torch import nn

from sparse_bwd.nn import (
    BatchNorm2d,
    Chain,
    CompactLayer,
    Dropout,
    Hardsigmoid,
    MaxPool2d,
    SparseEmbedding,
    SparseLayer,
)
from sparse_bwd.nn.affine_act import LeanActivation
from sparse_bwd.nn.lookalike import QuickGELU
from sparse_bwd.nn.smooth_act import SmoothActivation
from sparse_bwd.skipped import reasons_to_skip

BEFORE = "freeze every layer before it"
LEAN = (CompactLayer, Chain, LeanActivation, SmoothActivation, QuickGELU, Hardsigmoid, MaxPool2d, Dropout)


def how_to_free(module: nn.Module | None, dtype: torch.dtype) -> str:
    """What would free a tensor of this dtype that `module` keeps (None: it was saved outside of any module)."""
    if module is None:
        return "nothing in the model: the loss, or code around the model, keeps it"
    if isinstance(module, SparseLayer):
        return _weighted(module, dtype)
    if isinstance(module, BatchNorm2d) and module.mode == "train":
        return 'set the norm to "frozen" or "bias": sb.convert(model, batch_norm="bias")'
    if isinstance(module, LEAN):
        return BEFORE
    kind = type(module).__name__
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return f"freeze it: {kind} is trained whole"
    if any(True for _ in module.children()):
        return f"write what {kind}.forward computes itself as modules that have a lean version, or {BEFORE}"
    return f"{kind} has no lean version; {BEFORE}"


def _weighted(layer: SparseLayer, dtype: torch.dtype) -> str:
    if isinstance(layer, SparseEmbedding):
        return "select no token: these are the ids, or the index of the selection"
    if dtype is torch.int64:
        return "select whole layers or nothing: this is the index of the selection"
    if layer.axis == "in":
        return "select fewer input channels, or freeze it"
    if layer.groups > 1:
        return "select channels of fewer groups, or freeze it"
    return 'select on axis "in", or freeze it'


def why_dense(model: nn.Module, keepers: Iterable[nn.Module]) -> dict[str, str]:
    """Name -> why the module works as plain PyTorch does, for modules that could be lean or that keep something.

    `keepers` are the modules that were seen to keep something.
    """
    seen, found = set(keepers), {}
    skipped = reasons_to_skip(model)
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm2d) and module.mode == "train":
            found[name] = 'a norm in mode "train" keeps its input, as in PyTorch'
        elif name in skipped:
            found[name] = skipped[name]
        elif module in seen and not isinstance(module, LEAN):
            children = any(True for _ in module.children())
            found[name or "(model)"] = (
                f"operations in the forward of {type(module).__name__} keep tensors, and only modules are swapped"
                if children
                else f"{type(module).__name__} has no lean version"
            )
    return found
