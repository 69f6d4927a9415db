"""Compact parameters: the selected slices of a layer's full weight and bias, as ordinary small Parameters.

A layer keeps `weight` and `bias` whole and frozen under their stock names, and trains `trainable_weight` and
`trainable_bias`, which hold the selected slices only. Gradients and optimizer state therefore have the size of the
selection, and no optimizer can move what is not selected.

    write back   trainable -> full   in every forward, and before `weight`, `state_dict` or a copy is read
    refresh      full -> trainable   after `load_state_dict`, an assignment, or an in-place edit of `weight`

Of a layer that is trained whole both are one memory, and nothing is copied.
The copy into the full tensor does not bump its version counter, so that a second forward may run before the first
one's backward. Staleness is caught by saving the compact Parameter for backward as well (a Parameter: 0 bytes).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn.compiled import graph_view, of_any_length, same_length
from sparse_bwd.nn.index import Move, beside, mover
from sparse_bwd.nn.shards import (
    compact_shards,
    is_sharded,
    refresh_shards,
    shards_agree,
    synchronise_shards,
)
from sparse_bwd.nn.slot import TRAINABLE, Slot, Synced
from sparse_bwd.ops.layout import is_channels_last
from sparse_bwd.ops.write_back import read_slices, write_back


class CompactLayer(nn.Module):
    """What every layer with compact parameters shares. Subclasses name their slots and validate selections."""

    axis: str
    bias_mode: str
    selectable: bool
    _index: Tensor | None
    _slots: dict[str, Slot]
    _synced: dict[str, Synced]
    _graph: dict[str, Tensor]  # what torch.compile reads of the compact Parameters (`compiled.py`)
    _original_flags: dict[str, bool]
    any_length = True  # whether one graph of torch.compile serves every number of channels
    _sharded = False  # `sparse_bwd.distributed.shard` has made its tensors DTensors

    def _init_compact(self) -> None:
        """Add the state of a compact layer to a stock one: everything frozen, nothing selected."""
        self._original_flags = {n: p.requires_grad for n, p in self._parameters.items() if p is not None}
        self.selectable = self._original_flags.get("weight", True)
        self._slots, self._synced, self._graph = {}, {}, {}
        self._index = torch.zeros(0, dtype=torch.int64)
        self.axis, self.bias_mode = "out", "none"
        for name in TRAINABLE.values():
            self.register_parameter(name, None)

    def _strip_compact(self) -> None:
        """Undo `_init_compact`: write back, drop what was added, restore the flags."""
        self.synchronise()
        for name in TRAINABLE.values():
            self._parameters.pop(name, None)
        for name, flag in self._original_flags.items():
            parameter = self._parameters[name]
            if parameter is not None:
                parameter.requires_grad_(flag)
        for name in (
            "_original_flags",
            "selectable",
            "_slots",
            "_synced",
            "_graph",
            "_index",
            "axis",
            "bias_mode",
            "_last_group",
            "_sharded",
        ):
            self.__dict__.pop(name, None)

    # Selection

    def num_channels(self, axis: str = "out") -> int:
        """Channels that can be selected on the axis."""
        raise TypeError(f"{type(self).__name__} has no channels to select on axis {axis!r}.")

    @property
    def channels(self) -> Tensor | None:
        """Sorted int64 index of the trained channels on `axis`, on the layer's device; empty = none, None = all."""
        return self._index

    @property
    def has_trainable(self) -> bool:
        """Whether any compact Parameter exists."""
        return any(self._parameters.get(name) is not None for name in TRAINABLE.values())

    def own_index(self, chosen: Tensor | None, device: torch.device) -> Tensor | None:
        """A checked index on the layer's device: the vector that is there already, where it holds the same channels.

        A graph asks which of its inputs are one tensor, so whatever names the same channels must be one vector.
        """
        now = self._index
        placed = None if chosen is None else chosen.to(beside(device))
        same = now is not None and placed is not None and now.device == placed.device
        return now if same and torch.equal(now, placed) else placed  # type: ignore[arg-type]

    def _place(self, slots: dict[str, Slot]) -> None:
        """Install new slots and make their compact Parameters from the full tensors; kept where nothing changes."""
        self.synchronise()
        for name, trainable in TRAINABLE.items():
            old, new = self._slots.get(name), slots.get(name)
            if old is not None and new is not None and old.is_like(new):
                slots[name] = old
                continue
            parameter = None
            if new is not None:
                parameter = self._compact_parameter(name, new)
            self._parameters[trainable] = parameter
        self._slots, self._synced = slots, {}
        self._record(slots)
        self._show_graphs()

    def _show_graphs(self) -> None:
        """Make what torch.compile reads, anew after every change of a compact Parameter or an index."""
        self._graph = {}
        for name, slot in self._slots.items():
            part = self._parameters[TRAINABLE[name]]
            if slot.index is not None and part is not None and not is_sharded(part):
                of_any_length(slot.index if self.any_length else None)
                layout = is_channels_last(self._full(name))
                self._graph[name] = graph_view(part, slot.axis if self.any_length else None, layout)

    def trained(self, name: str) -> Tensor | None:
        """The compact tensor of "weight" or "bias" as forward reads it; None if nothing of it is trained."""
        slot = self._slots.get(name)
        if torch.compiler.is_compiling() and slot is not None and slot.index is not None:
            view = self._graph[name]
            if self.any_length:
                same_length(view, slot.axis, slot.index)
            return view
        return self._parameters[TRAINABLE[name]]

    # Full and compact tensors

    def _compact_parameter(self, name: str, slot: Slot) -> nn.Parameter:
        """A new Parameter of the selected slices; in the memory of the full tensor where that has their shape."""
        full = self._full(name)
        if is_sharded(full):
            return compact_shards(self, full, slot)
        with torch.no_grad():
            return nn.Parameter(
                full.detach() if slot.whole else read_slices(full, slot.index, slot.dim, slot.groups)
            )

    @property
    def copied_bytes(self) -> int:
        """Bytes of the compact Parameters that have memory of their own, beside the full tensors."""
        parts = [self._parameters[TRAINABLE[name]] for name, slot in self._slots.items() if not slot.whole]
        return sum(part.nbytes for part in parts if part is not None)

    def _full(self, name: str) -> Tensor:
        full = self._parameters[name]
        assert full is not None
        return full

    def current(self, name: str) -> Tensor | None:
        """A full tensor as forward reads it, once synchronised.

        Under torch.compile it is the compact one where that is the whole: two tensors in one memory, any of which is
        written, cannot both enter a graph.
        """
        slot = self._slots.get(name)
        if torch.compiler.is_compiling() and slot is not None and slot.whole:
            part = self._parameters[TRAINABLE[name]]
            return None if part is None else part.detach()
        return self._parameters[name]

    def _read(self, name: str) -> Tensor | None:
        """The property behind `weight` and `bias`: synchronise, then hand out the full Parameter."""
        if name not in self._parameters:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        if "_slots" in self.__dict__ and not shards_agree(self, name):
            self.synchronise()
        return self._parameters[name]

    def synchronise(self) -> None:
        """Make full and compact tensors agree, as the function `synchronise` says."""
        if self._slots:
            synchronise((self,))

    def _record(self, names: Iterable[str]) -> None:
        """Note that the named full tensors and their compact Parameters agree now."""
        if torch.compiler.is_compiling():  # a graph cannot read version counters
            return
        for name in names:
            full, part = self._full(name), self._parameters[TRAINABLE[name]]
            if part is not None and is_sharded(part) == self._sharded:  # in forward shards are gathered
                self._synced[name] = Synced(full, full._version, part, part._version)

    @torch.no_grad()
    def _refresh(self, names: Iterable[str]) -> None:
        """Take the compact values from the full tensors."""
        for name in names:
            slot, part = self._slots.get(name), self._parameters.get(TRAINABLE[name])
            if slot is not None and part is not None and self._sharded:
                refresh_shards(self._full(name), part, slot)
                self._record([name])
            elif slot is not None and part is not None:
                part.copy_(read_slices(self._full(name), slot.index, slot.dim, slot.groups))
                self._record([name])

    # nn.Module's protocol

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name in TRAINABLE and param is not None and "_slots" in self.__dict__:
            param.requires_grad_(False)
            self._refresh([name])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.synchronise()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in TRAINABLE.values():
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not self._sharded:  # shards may have been loaded in place, by torch.distributed.checkpoint
            self.synchronise()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ours = {prefix + name for name in TRAINABLE.values()}
        missing_keys[:] = [key for key in missing_keys if key not in ours]
        self._refresh([name for name in TRAINABLE if prefix + name in state_dict])

    def _apply(self, fn: Any, recurse: bool = True) -> CompactLayer:
        self.synchronise()
        super()._apply(fn, recurse)
        full = next((p for n in TRAINABLE if (p := self._parameters.get(n)) is not None), None)
        if full is not None:
            self._move_index(mover(full.device))
        self._synced = {}
        return self

    def _move_index(self, move: Move) -> None:
        """Bring index vectors to the device of the parameters."""
        self._index = move(self._index)
        self._slots = {n: replace(s, index=move(s.index)) for n, s in self._slots.items()}
        self._show_graphs()

    def __getstate__(self) -> dict[str, Any]:
        self.synchronise()
        return {**self.__dict__, "_synced": {}, "_graph": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._show_graphs()


def synchronise(layers: Iterable[CompactLayer]) -> None:
    """Make full and compact tensors of layers agree, in one write for all of them.

    Trained values go to the full tensor, user edits of it come back. An edit is an in-place change of the full tensor
    since both last agreed, while the compact one stayed as it was.
    """
    compiling = torch.compiler.is_compiling()  # a graph cannot read version counters
    fulls, parts, slots = [], [], []
    for layer in layers:
        parameters, synced = layer._parameters, layer._synced
        for name, slot in layer._slots.items():
            full, part = parameters[name], layer.trained(name)
            if full is None or part is None or full.device.type == "meta":  # no values that could disagree
                continue
            if layer._sharded and (is_sharded(full) or is_sharded(part)):
                synchronise_shards(layer, name, full, part, slot)
                continue
            if not compiling:
                last = synced.get(name)
                known = last is not None and last.full is full and last.part is part
                same_part = known and last.part_version == part._version  # type: ignore[union-attr]
                same_full = known and last.full_version == full._version  # type: ignore[union-attr]
                if same_part and not same_full:
                    layer._refresh([name])
                    continue
                if not same_full or not same_part:
                    layer._record([name])
            if slot.whole and (compiling or part.is_set_to(full)):
                continue  # one memory; a graph reads the compact one (`current`)
            # .data has a version counter of its own: the write stays invisible to graphs that saved `full`.
            fulls.append(full.data)
            parts.append(part.data)
            slots.append(slot)
    if fulls:
        write_back(
            fulls,
            parts,
            [slot.index for slot in slots],
            [slot.dim for slot in slots],
            [slot.groups for slot in slots],
        )


def nearest(name: str, known: Sequence[str]) -> str:
    """A clause that names the known names closest to `name`, for error messages."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"the nearest are {', '.join(close)}" if close else f"known are {', '.join(list(known)[:5])}"


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every Parameter that the optimizer should get: compact ones, and whatever else requires a gradient.

    Raises:
        ValueError: nothing is trainable.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "Nothing in this model is trainable; call policy.step() or sparse_bwd.apply() first."
        )
    return parameters
