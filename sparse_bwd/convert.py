"""Swap a model's layers for lean ones in place, and swap them back.

`convert` changes the class of each stock module and adds its compact state; the module objects, their full Parameters,
hooks, names and flags stay what they were. Only exact types are swapped, and never a module that its parent bypasses,
that is shared, or whose weight is tied or computed: those are left alone, and the report says why.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse_bwd.nn import affine_act, dropout, max_pool2d
from sparse_bwd.nn.chain import Chain, can_chain
from sparse_bwd.nn.compact import TRAINABLE, CompactLayer, nearest
from sparse_bwd.nn.conv import SparseConv2d
from sparse_bwd.nn.linear import SparseLinear

_STATELESS: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: affine_act.ReLU,
    nn.ReLU6: affine_act.ReLU6,
    nn.Hardtanh: affine_act.Hardtanh,
    nn.LeakyReLU: affine_act.LeakyReLU,
    nn.MaxPool2d: max_pool2d.MaxPool2d,
    nn.Dropout: dropout.Dropout,
}
_WEIGHTED: dict[type[nn.Module], type[CompactLayer]] = {
    nn.Conv2d: SparseConv2d,
    nn.Linear: SparseLinear,
    nn.BatchNorm2d: affine_act.BatchNorm2d,
}
_LEAN: dict[type[nn.Module], type[nn.Module]] = {**_STATELESS, **_WEIGHTED}
_CANDIDATES: tuple[type[nn.Module], ...] = tuple(_LEAN)
_STOCK: dict[type[nn.Module], type[nn.Module]] = {lean: stock for stock, lean in _LEAN.items()}

# Reading a weight's type or size does not bypass its module's forward.
_READS_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size|ndim|dim|numel)\b)")


@dataclass
class Report:
    """What `convert` did. `str(report)` is a table for people."""

    swapped: dict[str, str] = field(default_factory=dict)  # name -> kind
    skipped: dict[str, str] = field(default_factory=dict)  # name -> reason
    always_trained: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # parameters of skipped modules that still train
    trainable_params: int = 0
    all_params: int = 0

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for kind in self.swapped.values():
            kinds[kind] = kinds.get(kind, 0) + 1
        share = 100 * self.trainable_params / self.all_params if self.all_params else 0.0
        lines = ["swapped: " + (", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) or "nothing")]
        if self.always_trained:
            lines.append("always trained: " + ", ".join(self.always_trained))
        lines += [f"skipped: {name}: {reason}" for name, reason in self.skipped.items()]
        if self.outside:
            lines.append(
                f"trained outside any budget: {len(self.outside)} parameters of skipped modules "
                f"({', '.join(self.outside[:3])}{', ...' if len(self.outside) > 3 else ''}); "
                "call requires_grad_(False) on them to freeze them"
            )
        lines.append(
            f"trainable params: {self.trainable_params:,} || all params: {self.all_params:,} || trainable%: {share:.2f}"
        )
        return "\n".join(lines)


def convert(
    model: nn.Module, batch_norm: str = "frozen", always_train: str | Iterable[str] | None = None
) -> Report:
    """Swap the layers of `model` in place; every swapped layer starts with nothing selected.

    Args:
        batch_norm: mode of the swapped norms: "frozen", "bias" (shift trained) or "train" (PyTorch's).
        always_train: names of modules that stay as they are and are trained whole; None = the classifier
            (timm's `get_classifier`, else the last Linear); an empty list = none.

    Returns:
        What was swapped, what was skipped and why, and the number of trainable parameters.

    Raises:
        ValueError: an unknown mode or name, or a model that is converted already. The model is then unchanged.
    """
    if batch_norm not in ("frozen", "bias", "train"):
        raise ValueError(f"batch_norm must be 'frozen', 'bias' or 'train', not {batch_norm!r}.")
    if any(isinstance(m, CompactLayer | Chain) for m in model.modules()):
        raise ValueError("This model holds converted layers already; call sparse_bwd.restore(model) first.")
    report = Report(always_trained=_always_trained(model, always_train))
    inside = {m for name in report.always_trained for m in model.get_submodule(name).modules()}
    reasons = _reasons(model)
    for name, module in model.named_modules():
        if module in inside or not isinstance(module, _CANDIDATES):
            continue
        reason = reasons.get(module) or _own_reason(module, batch_norm)
        if reason:
            report.skipped[name] = reason
        else:
            report.swapped[name] = _swap(module, batch_norm)
    for name, module in reversed(list(model.named_modules())):  # inner Sequentials first
        if type(module).forward is nn.Sequential.forward and module not in inside and can_chain(module):
            module.__dict__["_stock_class"] = type(module)
            module.__class__ = Chain
            report.swapped[name] = "Chain"
    for name in report.skipped:
        report.outside += [n for n, p in model.get_submodule(name).named_parameters(name) if p.requires_grad]
    sized = [(n, p) for n, p in model.named_parameters() if not is_lazy(p)]
    report.trainable_params = sum(p.numel() for _, p in sized if p.requires_grad)
    report.all_params = sum(p.numel() for n, p in sized if not n.endswith(_COMPACT_NAMES))
    return report


_COMPACT_NAMES = tuple(TRAINABLE.values())


def restore(model: nn.Module) -> nn.Module:
    """Turn the layers back into the stock ones, in place: same keys, order, dtype, device, layout and flags.

    Trained entries hold their last values, all others are bit-identical to the original. Returns the model. ValueError
    for one that is sharded by `sparse_bwd.distributed.shard`.
    """
    if any(isinstance(module, CompactLayer) and module._sharded for module in model.modules()):
        raise ValueError(
            "This model is sharded; load its full state dict into a plain model instead (docs/distributed.md)."
        )
    for module in model.modules():
        if isinstance(module, CompactLayer):
            module._strip_compact()
        stock: type[nn.Module] | None = _STOCK.get(type(module))
        if isinstance(module, Chain):
            stock = module.__dict__.pop("_stock_class", None)
        if stock is not None:
            module.__class__ = stock
    return model


def _swap(module: nn.Module, batch_norm: str) -> str:
    """Change the module's class; returns its kind."""
    stock = type(module)
    lean: type[nn.Module] = _LEAN[stock]
    module.__class__ = lean
    if isinstance(module, affine_act.BatchNorm2d):
        module._convert(batch_norm)
    elif isinstance(module, SparseConv2d | SparseLinear):
        module._convert()
    return stock.__name__


def _always_trained(model: nn.Module, names: str | Iterable[str] | None) -> list[str]:
    """Names of the modules that stay whole, checked."""
    known = {name: module for name, module in model.named_modules() if name}
    if names is None:
        return _classifier(model, known)
    result = [names] if isinstance(names, str) else list(names)
    for name in result:
        if name not in known:
            raise ValueError(
                f"always_train names '{name}', which is no module of this model; {nearest(name, list(known))}."
            )
    return result


def _classifier(model: nn.Module, known: dict[str, nn.Module]) -> list[str]:
    if callable(getattr(model, "get_classifier", None)):
        head = model.get_classifier()  # type: ignore[operator]
        heads = head if isinstance(head, tuple | list) else [head]
        found = [name for name, module in known.items() if any(module is h for h in heads)]
        if any(any(True for _ in known[name].parameters()) for name in found):
            return found
    linear = [name for name, module in known.items() if type(module) is nn.Linear]
    return linear[-1:]


def _reasons(model: nn.Module) -> dict[nn.Module, str]:
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
            if isinstance(module, nn.MultiheadAttention) or attribute in bypassed[type(module)]:
                parent = type(module).__name__
                reasons[child] = f"bypassed by its parent {parent}, which reads its weight directly"
    for module, known in names.items():
        if len(known) > 1 and type(module) in _WEIGHTED:
            reasons[module] = f"shared module, also known as {', '.join(known[1:])}"
    for holders in owners.values():
        if len(holders) > 1:
            for module in holders:
                reasons.setdefault(module, "tied weight: another module holds the same Parameter")
    return reasons


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


def _own_reason(module: nn.Module, batch_norm: str) -> str | None:
    """Why a module must not be swapped because of what it is; None = swap it."""
    if torch.nn.utils.parametrize.is_parametrized(module) or (
        "weight" not in module._parameters and type(module) in _WEIGHTED
    ):
        return "parametrised: its weight is computed from other parameters"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: it has no shape yet; run one batch through the model before converting"
    if type(module) not in _STOCK.values():
        base = next(t.__name__ for t in type(module).__mro__ if t in _STOCK.values())
        return f"subclass: {type(module).__module__}.{type(module).__name__} is not exactly nn.{base}"
    if isinstance(module, nn.BatchNorm2d) and batch_norm != "train" and module.running_mean is None:
        return f"it has no running statistics, which mode '{batch_norm}' needs"
    return None


def reasons_to_skip(model: nn.Module) -> dict[str, str]:
    """Name -> why a module that could be lean is not, in a model that was converted; lean modules are left out."""
    reasons, found = _reasons(model), {}
    for name, module in model.named_modules():
        if not isinstance(module, _CANDIDATES) or type(module) in _STOCK:
            continue
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        rest = "trained whole, beside the selection (always_train)" if trained else "it was not converted"
        found[name] = reasons.get(module) or _own_reason(module, "frozen") or rest
    return found
