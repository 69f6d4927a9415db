"""Swap a model's layers for lean ones in place, and swap them back.

`convert` changes the class of each stock module and adds its compact state; the module objects, their full Parameters,
hooks, names and flags stay what they were. Only exact types and known look-alikes (`nn/lookalike.py`) are swapped, and
never a module that its parent bypasses, that is shared, or whose weight is tied or computed: those are left alone, and
the report says why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from sparse_bwd.nn import attention
from sparse_bwd.nn.chain import Chain, can_chain
from sparse_bwd.nn.compact import CompactLayer, nearest
from sparse_bwd.nn.kinds import LEAN, STOCK, is_candidate
from sparse_bwd.nn.lookalike import lookalike
from sparse_bwd.nn.norm import ShiftedNorm, check_mode
from sparse_bwd.nn.slot import TRAINABLE
from sparse_bwd.nn.sparse_layer import SparseLayer
from sparse_bwd.skipped import own_reason, reasons_in


@dataclass
class Report:
    """What `convert` did. `str(report)` is a table for people."""

    swapped: dict[str, str] = field(default_factory=dict)  # name -> kind
    skipped: dict[str, str] = field(default_factory=dict)  # name -> reason
    always_trained: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)  # parameters of no swapped module that still train
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
                f"trained outside any budget: {len(self.outside)} parameters that no swapped module holds "
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
        batch_norm: mode of the swapped norms, batch or layer: "frozen", "bias" (shift trained) or "train" (PyTorch's).
        always_train: names of modules that stay as they are and are trained whole; None = the classifier
            (timm's `get_classifier`, else the last Linear); an empty list = none.

    Returns:
        What was swapped, what was skipped and why, and the number of trainable parameters.

    Raises:
        ValueError: an unknown mode or name, or a model that is converted already. The model is then unchanged.
    """
    check_mode(batch_norm)
    if any(isinstance(m, CompactLayer | Chain) for m in model.modules()):
        raise ValueError("This model holds converted layers already; call sparse_bwd.restore(model) first.")
    report = Report(always_trained=_always_trained(model, always_train))
    inside = {m for name in report.always_trained for m in model.get_submodule(name).modules()}
    reasons = reasons_in(model)
    for name, module in list(model.named_modules()):
        if module in inside:
            continue
        _close_fast_path(module)
        if not is_candidate(module):
            continue
        reason = reasons.get(module) or own_reason(module, batch_norm)
        if reason:
            report.skipped[name] = reason
        else:
            report.swapped[name] = _swap(module, batch_norm)
            if isinstance(module, attention.MultiheadAttention):
                report.swapped[f"{name}.in_proj" if name else "in_proj"] = "in_proj"
    for name, module in reversed(list(model.named_modules())):  # inner Sequentials first
        if type(module).forward is nn.Sequential.forward and module not in inside and can_chain(module):
            _become(module, Chain)
            report.swapped[name] = "Chain"
    swapped = {m for m in model.modules() if isinstance(m, CompactLayer)} | inside
    held = {p for m in swapped for p in m.parameters(recurse=False)}
    report.outside = [n for n, p in model.named_parameters() if p.requires_grad and p not in held]
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
    for module in list(model.modules()):
        if isinstance(module, attention.MultiheadAttention):
            module._strip()
        elif isinstance(module, CompactLayer) and not isinstance(module, attention.InProjection):
            module._strip_compact()
        for word in _FAST_PATHS:
            if f"_stock_{word}" in module.__dict__:
                setattr(module, word, module.__dict__.pop(f"_stock_{word}"))
        stock: type[nn.Module] | None = module.__dict__.pop("_stock_class", STOCK.get(type(module)))
        if stock is not None:
            module.__class__ = stock
    return model


def _swap(module: nn.Module, batch_norm: str) -> str:
    """Change the module's class; returns its kind."""
    stock = type(module)
    alike = lookalike(module)
    if alike is not None:
        _become(module, alike)
    else:
        module.__class__ = LEAN[stock]
    if isinstance(module, ShiftedNorm):
        module._convert(batch_norm)
    elif isinstance(module, SparseLayer | attention.MultiheadAttention):
        module._convert()
    return stock.__name__


def _become(module: nn.Module, lean: type[nn.Module]) -> None:
    """Change the class of a module whose own class is not known from its lean one."""
    module.__dict__["_stock_class"] = type(module)
    module.__class__ = lean


# Of nn.TransformerEncoder and its layers: the attributes that let them read all weights themselves outside of training,
# where they ask whether a full weight needs a gradient and know nothing of a compact one.
_FAST_PATHS: dict[str, tuple[type[nn.Module], Any]] = {
    "activation_relu_or_gelu": (nn.TransformerEncoderLayer, 0),
    "use_nested_tensor": (nn.TransformerEncoder, False),
}


def _close_fast_path(module: nn.Module) -> None:
    """Make the module call its layers in every mode."""
    for word, (kind, closed) in _FAST_PATHS.items():
        if isinstance(module, kind) and word in module.__dict__:
            module.__dict__[f"_stock_{word}"] = module.__dict__[word]
            setattr(module, word, closed)


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
