"""Make a model train what a selection names, and carry the optimizer over.

`apply` gives each layer its compact Parameters, puts them in the optimizer's groups in place of the old ones, and moves
the optimizer state of channels that stay selected to their new positions; channels that are new start at zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import CompactLayer, ShiftedNorm, SparseLayer, layers, norms
from sparse_bwd.nn.shards import gathered, is_sharded, placed_like
from sparse_bwd.nn.slot import TRAINABLE, Slot
from sparse_bwd.selection.compile_limit import warn_at_limit
from sparse_bwd.selection.selection import Channels, Selection

GroupOf = Callable[[str, nn.Parameter], int]


def apply(
    model: nn.Module,
    selection: Mapping[str, Channels | Tensor | Sequence[int] | None],
    optimizer: torch.optim.Optimizer | None = None,
    group: GroupOf | None = None,
) -> None:
    """Train exactly what `selection` names, and freeze every other swapped layer.

    Norm layers that it does not name keep what `convert(batch_norm=...)` gave them. Call it between optimizer steps.

    Args:
        selection: layer name -> `Channels` (or a list of channels, axis "out").
        optimizer: the optimizer whose groups and state follow; None when it is made afterwards.
        group: (parameter name, parameter) -> index of the param group for a new compact Parameter; default: the group
            its layer was in last, else the first.

    Raises:
        ValueError: unknown names or channels, or gradients that no optimizer step has used yet. Nothing is changed.
    """
    wanted = selection if isinstance(selection, Selection) else Selection(selection)
    wanted.validate(model)
    compact: dict[str, CompactLayer] = {**layers(model), **norms(model)}
    refuse_pending(compact)
    groups = None if optimizer is None else _Groups(optimizer)
    try:
        for name, layer in compact.items():
            before = {n: (layer._parameters[t], layer._slots.get(n)) for n, t in TRAINABLE.items()}
            _select(layer, wanted.get(name))
            if groups is not None:
                for kind, (old, old_slot) in before.items():
                    new, slot = layer._parameters[TRAINABLE[kind]], layer._slots.get(kind)
                    _migrate(groups, layer, kind, name, (old, old_slot), (new, slot), group)
    finally:
        if groups is not None:
            groups.close()
    warn_at_limit(model, compact)


def _select(layer: CompactLayer, channels: Channels | None) -> None:
    if isinstance(layer, ShiftedNorm):
        if channels is not None:
            layer.set_channels(channels.index)
        else:
            layer.set_channels(None if layer.mode == "bias" else [])
    elif isinstance(layer, SparseLayer):
        if channels is not None:
            layer.set_channels(channels.index, axis=channels.axis, bias=channels.bias)
        else:
            layer.set_channels([], bias="none")


def refuse_pending(compact: dict[str, CompactLayer]) -> None:
    """Refuse in the middle of an accumulation window: gradients of the old selection would be lost."""
    for name, layer in compact.items():
        for trainable in TRAINABLE.values():
            parameter = layer._parameters[trainable]
            if parameter is not None and parameter.grad is not None and _any(parameter.grad):
                raise ValueError(
                    f"{name}.{trainable} holds a gradient that no optimizer step has cleared; select between steps: "
                    "call optimizer.step() and optimizer.zero_grad() first."
                )


def _any(gradient: Tensor) -> bool:
    """Whether a gradient, which may be sharded, is anywhere other than zero."""
    return bool(gathered(gradient).any())


class _Groups:
    """The groups of an optimizer, with the place of every Parameter: to look for each anew takes time with the square.

    What is taken out leaves a gap until `close`, so that the places of all others stay right.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._lists: list[list[nn.Parameter | None]] = [group["params"] for group in optimizer.param_groups]
        self._place: dict[int, tuple[int, int]] = {}
        self._new: list[nn.Parameter] = []
        for g, entries in enumerate(self._lists):
            for i, parameter in enumerate(entries):
                self._place.setdefault(id(parameter), (g, i))

    def place(self, parameter: Tensor | None) -> tuple[int, int] | None:
        """(group, position) of a Parameter."""
        return None if parameter is None else self._place.get(id(parameter))

    def exchange(self, old: nn.Parameter, new: nn.Parameter | None) -> None:
        """Put `new` where `old` is; None leaves the place empty."""
        g, i = self._place.pop(id(old))
        self._lists[g][i] = new
        if new is not None:
            self._place[id(new)] = g, i
            self._new.append(new)

    def append(self, new: nn.Parameter, where: int) -> None:
        """Add a Parameter to a group; to the last one where there are fewer."""
        g = min(where, len(self._lists) - 1)
        self._place[id(new)] = g, len(self._lists[g])
        self._lists[g].append(new)
        self._new.append(new)

    def close(self) -> None:
        """Remove the gaps, and give new Parameters the momentum that fused SGD wants of all or none of a group."""
        for entries in self._lists:
            entries[:] = [parameter for parameter in entries if parameter is not None]
        # accelerate wraps the optimizer that it prepares.
        if not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), torch.optim.SGD):
            return
        state, groups = self.optimizer.state, self.optimizer.param_groups
        mixed = [
            bool(group.get("fused")) and any("momentum_buffer" in state.get(p, {}) for p in group["params"])
            for group in groups
        ]
        for new in self._new:
            if mixed[self._place[id(new)][0]] and new not in state:
                state[new] = {"momentum_buffer": torch.zeros_like(new)}


def _migrate(
    groups: _Groups,
    layer: CompactLayer,
    kind: str,
    name: str,
    before: tuple[nn.Parameter | None, Slot | None],
    after: tuple[nn.Parameter | None, Slot | None],
    group: GroupOf | None,
) -> None:
    """Exchange one compact Parameter in the optimizer's groups and move its state."""
    (old, old_slot), (new, slot) = before, after
    if old is new:
        if new is not None and groups.place(new) is None:
            _insert(groups, layer, kind, name, new, group)
        return
    place = groups.place(old)
    stays = place is not None and group is None and new is not None
    state: dict[str, Any] = {}
    if old is not None and place is not None:
        layer.__dict__.setdefault("_last_group", {})[kind] = place[0]
        state = groups.optimizer.state.pop(old, {})
        groups.exchange(old, new if stays else None)
    if new is None or slot is None:
        return
    if not stays:
        _insert(groups, layer, kind, name, new, group)
    if state and old is not None and old_slot is not None:
        carried = _carry(state, old, old_slot, new, slot, f"{name}.{TRAINABLE[kind]}")
        if carried:
            groups.optimizer.state[new] = carried


def _insert(
    groups: _Groups,
    layer: CompactLayer,
    kind: str,
    name: str,
    new: nn.Parameter,
    group: GroupOf | None,
) -> None:
    """Append a Parameter to the group it belongs to: the user's choice, its layer's last group, that of the layer's
    full weight (which `model.parameters()` put there), else the first."""
    if group is not None:
        where = group(f"{name}.{TRAINABLE[kind]}", new)
        count = len(groups.optimizer.param_groups)
        if not 0 <= where < count:
            raise ValueError(f"group() returned {where}, but the optimizer has {count} groups.")
    else:
        last: dict[str, int] = layer.__dict__.get("_last_group", {})
        full = layer._parameters[kind]
        found = groups.place(full)
        where = last.get(kind, last.get("weight", found[0] if found else 0))
    groups.append(new, where)


def _carry(
    state: dict[str, Any], old: Tensor, old_slot: Slot, new: Tensor, slot: Slot, what: str
) -> dict[str, Any]:
    """Optimizer state for the new compact Parameter: kept where a channel stays, zero where it is new."""
    if (old_slot.dim, old_slot.groups) != (slot.dim, slot.groups):
        return {}
    dim = 0 if slot.groups > 1 else slot.dim
    target, source = _staying(slot, old_slot, new.shape[dim], old.shape[dim], new.device)
    if target.numel() == 0:
        return {}
    carried: dict[str, Any] = {}
    for key, value in state.items():
        if (
            not isinstance(value, Tensor)
            or value.dim() == 0
            or (value.numel() == 1 and value.shape != old.shape)
        ):
            carried[key] = value
        elif value.shape == old.shape:
            fresh = torch.zeros(new.shape, dtype=value.dtype, device=new.device)
            fresh = fresh if is_sharded(new) else torch.zeros_like(new, dtype=value.dtype)
            fresh.index_copy_(dim, target, gathered(value).index_select(dim, source))
            carried[key] = placed_like(fresh, new) if is_sharded(new) else fresh
        else:
            warnings.warn(
                f"The optimizer state '{key}' of {what} has shape {tuple(value.shape)}, which does not follow the "
                "channels; the state of this layer starts anew.",
                stacklevel=4,
            )
            return {}
    return carried


def _staying(
    slot: Slot, old_slot: Slot, count: int, old_count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of the channels selected before and now: (in the new Parameter, in the old one)."""
    now = torch.arange(count, device=device) if slot.index is None else slot.index
    was = torch.arange(old_count, device=device) if old_slot.index is None else old_slot.index
    target = torch.isin(now, was).nonzero().flatten()
    source = torch.isin(was, now).nonzero().flatten()
    return target, source
