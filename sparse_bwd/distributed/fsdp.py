"""FSDP2 (`torch.distributed.fsdp.fully_shard`) with compact Parameters.

FSDP2 manages a fixed set of Parameters, and a selection makes new ones. So `shard` leaves the compact ones out of it
and shards them itself: each is a DTensor of its own, whose gradient and optimizer state are sharded with it.

    before the model's forward   gather the compact slices; write them into the shards of the full weights
    in forward and backward      FSDP2 gathers full weights from shards that hold the trained values
    in backward                  the compact gradients are reduced and scattered: averaged over the mesh

Traffic of a step beyond FSDP2's own: the compact Parameters once forward and their gradients once backward.
Memory between forward and backward: the gathered compact slices. The shards, and not only gathered copies, must hold
the trained values, since FSDP2 gathers the weights again in backward, where dx needs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import CompactLayer
from sparse_bwd.nn.shards import check_rows, is_sharded, placed_like, write_shards
from sparse_bwd.nn.slot import TRAINABLE


def shard(model: nn.Module, units: Iterable[nn.Module] = (), **options: Any) -> nn.Module:
    """Shard a converted model by FSDP2, with its compact Parameters; returns the model.

    Call it before the optimizer is made; selections may come before and after, and `policy.step(optimizer)` and
    `sb.apply` work as ever, on all ranks.

    Args:
        units: submodules that are gathered one at a time, such as the blocks of a transformer; inner ones first.
        options: of `fully_shard`: mesh, reshard_after_forward, mp_policy, ...; shards are always of rows.

    Raises:
        ValueError: the model is not converted, or sharded already.
    """
    from torch.distributed.fsdp import fully_shard

    layers = [module for module in model.modules() if isinstance(module, CompactLayer)]
    if not layers:
        raise ValueError("This model holds no converted layers; call sb.convert(model) before shard(model).")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "This model is sharded already; call shard(model, units) in place of fully_shard, on the whole model."
        )
    if "shard_placement_fn" in options or "ignored_params" in options:
        raise ValueError(
            "shard() shards rows by its own rule: leave out shard_placement_fn and ignored_params."
        )
    for layer in layers:
        layer.synchronise()
        layer.__dict__["_sharded"] = True
    compact = {
        p for layer in layers for name in TRAINABLE.values() if (p := layer._parameters[name]) is not None
    }
    try:
        for unit in [*units, model]:
            fully_shard(unit, ignored_params=compact, **options)
    except BaseException:
        for layer in layers:
            layer.__dict__.pop("_sharded", None)
        raise
    for layer in layers:
        _shard_layer(layer)
    policy = options.get("mp_policy")
    gather = _Gather(layers, None if policy is None else policy.param_dtype)
    model.register_forward_pre_hook(gather.before, prepend=True)
    model.register_forward_hook(gather.after, always_call=True)
    return model


def _shard_layer(layer: CompactLayer) -> None:
    """Make the compact Parameters of a layer DTensors, placed as its full ones."""
    for name, trainable in TRAINABLE.items():
        part, full = layer._parameters[trainable], layer._parameters[name]
        if full is not None:
            check_rows(full, f"The {name} of a {type(layer).__name__}")
        if part is not None:
            values = part.detach().clone() if layer._slots[name].whole else part.detach()
            layer._parameters[trainable] = nn.Parameter(placed_like(values, full))
    layer._synced = {}
    layer._record(layer._slots)


class _Gather:
    """Hooks around the model's forward."""

    def __init__(self, layers: list[CompactLayer], dtype: torch.dtype | None) -> None:
        self.layers, self.dtype = layers, dtype
        self._kept: list[tuple[CompactLayer, str, nn.Parameter]] = []

    def before(self, model: nn.Module, args: Any) -> None:
        """Bring shards up to date, and put the gathered slices where the layers look for their compact Parameters."""
        for layer in self.layers:
            for name, slot in layer._slots.items():
                part, full = layer._parameters[TRAINABLE[name]], layer._parameters[name]
                if part is None or full is None:
                    continue
                values = self._gathered(part)
                with torch.no_grad():
                    write_shards(full, values, slot)
                layer._record([name])
                self._kept.append((layer, TRAINABLE[name], part))
                # What the layer reads in forward need not be a Parameter; `after` puts that back.
                cast = values if self.dtype is None else values.to(self.dtype)
                layer._parameters[TRAINABLE[name]] = cast  # type: ignore[assignment]

    def _gathered(self, part: Any) -> Tensor:
        """All slices, whose gradients are averaged over the mesh and scattered."""
        from torch.distributed.tensor import Partial

        mesh = part.device_mesh
        values: Tensor = part.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        if values.requires_grad:
            values.register_hook(lambda gradient: gradient / mesh.size())
        return values

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Give the layers their own Parameters back."""
        for layer, name, part in self._kept:
            layer._parameters[name] = part
        self._kept = []
        if not torch.is_grad_enabled():
            # FSDP2 leaves the root's own weights whole, for a backward that does not come after a probe.
            model.reshard()  # type: ignore[operator]
