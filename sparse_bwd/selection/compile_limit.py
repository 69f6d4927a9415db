"""A sentence where torch.compile is about to give up, because it compiled one function for too many sets of layers.

A graph serves every selection of the same layers (`sparse_bwd.nn.compiled`), and each new set of trained layers is one
more. Dynamo keeps `recompile_limit` of them per function; beyond, it runs the function eagerly, or raises an error of
its own under fullgraph=True.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping

import torch
from torch import nn

from sparse_bwd.nn import CompactLayer

Pattern = frozenset[tuple[str, str, bool]]  # trained tensors: layer, "weight" or "bias", whole
_seen: weakref.WeakKeyDictionary[nn.Module, set[Pattern]] = weakref.WeakKeyDictionary()


def warn_at_limit(model: nn.Module, compact: Mapping[str, CompactLayer]) -> None:
    """Warn if the model now trains what it never did, and a function of it may not be compiled again."""
    if "torch._dynamo" not in sys.modules:
        return
    pattern = frozenset(
        (name, kind, slot.index is None)
        for name, layer in compact.items()
        for kind, slot in layer._slots.items()
    )
    seen = _seen.setdefault(model, set())
    known = pattern in seen
    seen.add(pattern)
    limit: int = torch._dynamo.config.recompile_limit
    if known or (name := _full_function(model, limit)) is None:
        return
    warnings.warn(
        f"torch.compile has compiled {name} {limit} times, which is its limit, and this selection trains another set "
        "of layers than any before: it will run without being compiled, or fail under fullgraph=True. Keep the layers "
        "and change only their channels (keep_layers=True of a policy with a budget), or raise "
        "torch._dynamo.config.recompile_limit before compiling.",
        RuntimeWarning,
        stacklevel=4,
    )


def _full_function(model: nn.Module, limit: int) -> str | None:
    """The name of a forward of the model that dynamo has compiled as often as it may; None if there is none."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    for kind in {type(module) for module in model.modules()}:
        code = getattr(kind.forward, "__code__", None)
        if code is not None and len(_debug_get_cache_entry_list(code)) >= limit:
            return f"{kind.__name__}.forward"
    return None
