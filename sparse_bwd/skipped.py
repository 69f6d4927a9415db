"""Why a module must not be swapped: for what it is, or for where it stands in the model."""

from __future__ import annotations

import inspect
import re

import torch
from torch import Tensor, nn

from sparse_bwd.nn import attention
from sparse_bwd.nn.compact import CompactLayer
from sparse_bwd.nn.kinds import PARENTS, STOCK, WEIGHTED, is_candidate
from sparse_bwd.nn.lookalike import LOOKALIKES, lookalike

# Reading a weight's type or size does not bypass its module's forward.
_READS_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim|dim|numel)\b)")


def reasons_in(model: nn.Module) -> dict[nn.Module, str]:
    """Why a module must not be swapped because of where it stands in the model."""
    reasons: dict[nn.Module, str] = {}
    names: dict[nn.Module, list[str]] = {}
    owners: dict[Tensor, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    bypassed = {kind: _bypassed(kind) for kind in {type(module) for module in names}}
    for module in names:
        for tensor in module._parameters.values():
            if tensor is not None:
                owners.setdefault(tensor, []).append(module)
        for attribute, child in module.named_children():
            if attribute in bypassed[type(module)] and lookalike(module) is None:
                reasons[child] = _bypassed_by(module)
    for module, known in names.items():
        if len(known) > 1 and type(module) in (*WEIGHTED, *PARENTS):
            reasons[module] = f"shared module, also known as {', '.join(known[1:])}"
    for holders in owners.values():
        if len(holders) > 1:
            for module in holders:
                reasons.setdefault(module, "tied weight: another module holds the same Parameter")
    for module in names:
        if isinstance(module, nn.MultiheadAttention) and (module in reasons or own_reason(module, "frozen")):
            for child in module.children():
                reasons[child] = _bypassed_by(module)
    return reasons


def _bypassed_by(parent: nn.Module) -> str:
    return f"bypassed by its parent {type(parent).__name__}, which reads its weight directly"


def _bypassed(parent: type[nn.Module]) -> frozenset[str]:
    """Attributes whose weight the class's forward methods read as `self.<attribute>.weight`, as its source shows.

    Such a parent computes with the full weight by itself, so that gradients would never reach a compact Parameter.
    """
    found: set[str] = set()
    for owner in parent.__mro__:
        if owner.__module__.startswith("torch.nn.") or owner is object:
            continue
        for name, method in vars(owner).items():
            if inspect.isfunction(method) and name.lstrip("_").startswith("forward"):
                try:
                    found.update(_READS_WEIGHT.findall(inspect.getsource(method)))
                except (OSError, TypeError):
                    continue
    return frozenset(found)


def own_reason(module: nn.Module, batch_norm: str) -> str | None:
    """Why a module must not be swapped because of what it is; None = swap it."""
    if torch.nn.utils.parametrize.is_parametrized(module) or (
        "weight" not in module._parameters and type(module) in WEIGHTED
    ):
        return "parametrised: its weight is computed from other parameters"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: it has no shape yet; run one batch through the model before converting"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it has max_norm, which rewrites rows of the table in forward"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} axes; the lean one takes the last axis alone"
    if type(module) not in STOCK.values() and lookalike(module) is None:
        base = next(t.__name__ for t in type(module).__mro__ if t in STOCK.values())
        return f"subclass: {type(module).__module__}.{type(module).__name__} is not exactly nn.{base}"
    if isinstance(module, nn.MultiheadAttention):
        return attention.why_not(module)
    if isinstance(module, nn.BatchNorm2d) and batch_norm != "train" and module.running_mean is None:
        return f"it has no running statistics, which mode '{batch_norm}' needs"
    return None


def reasons_to_skip(model: nn.Module) -> dict[str, str]:
    """Name -> why a module that could be lean is not, in a model that was converted; lean modules are left out."""
    reasons, found = reasons_in(model), {}
    for name, module in model.named_modules():
        if (
            not is_candidate(module)
            or type(module) in STOCK
            or isinstance(module, (CompactLayer, *LOOKALIKES))
        ):
            continue
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        rest = "trained whole, beside the selection (always_train)" if trained else "it was not converted"
        found[name] = reasons.get(module) or own_reason(module, "frozen") or rest
    return found
