"""DistributedDataParallel that follows the selection.

DDP makes its reducer, with the buckets in which gradients are averaged, when it wraps a model. A selection replaces
compact Parameters: the reducer would wait for the old ones in vain, which is an error, or, with
find_unused_parameters=True, leave the new ones to drift apart without a word. `follow` makes a new reducer before the
first forward that finds other Parameters; nothing but its buckets is allocated, and no weight travels.

Traffic of a step: the compact gradients, once; and with broadcast_buffers=True (DDP's default) the buffers, which norms
on running statistics never change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_bwd.nn import CompactLayer
from sparse_bwd.nn.slot import TRAINABLE


def follow(ddp: DistributedDataParallel) -> DistributedDataParallel:
    """Let `ddp` follow every later selection of its model, by itself; returns `ddp`.

    Everything that `ddp` was made with stays: process group, bucket size, communication hooks. Call it once, after
    wrapping. A check of the compact Parameters is added to each forward.

    Raises:
        TypeError: `ddp` is not a DistributedDataParallel.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"follow() needs a DistributedDataParallel, got {type(ddp).__name__}; wrap the model first."
        )
    if not any(isinstance(hook, _Watch) for hook in ddp._forward_pre_hooks.values()):
        ddp.register_forward_pre_hook(_Watch(ddp.module))
    return ddp


def rewrap(ddp: DistributedDataParallel) -> None:
    """Make the reducer of `ddp` anew for the Parameters that its model trains now, in place."""
    hooks = list(ddp._comm_hooks)
    ddp._module_parameters = [
        parameter for name, parameter in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore
    ]
    # As DDP does itself when it is unpickled.
    parameters, sparse = ddp._build_params_for_reducer()
    if not parameters:
        raise ValueError(
            "The selection leaves nothing to train in the model inside DistributedDataParallel; raise the budget or "
            "keep the classifier trained (always_train)."
        )
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        assert ddp.logger is not None
        ddp.logger._set_static_graph()
    for hook, state in hooks:
        dist._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined]


class _Watch:
    """A hook before each forward of a DDP: makes the reducer anew if the compact Parameters are not those of before."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, CompactLayer)]
        self._known = self._now()

    def _now(self) -> list[Any]:
        """The compact Parameters themselves: they live as long as the reducer that was made for them."""
        return [layer._parameters[name] for layer in self._layers for name in TRAINABLE.values()]

    def __call__(self, ddp: nn.Module, args: Any) -> None:
        now = self._now()
        if any(a is not b for a, b in zip(now, self._known, strict=True)):
            assert isinstance(ddp, DistributedDataParallel)
            if torch.is_grad_enabled():
                self._known = now
                rewrap(ddp)
