"""Whose bytes they are: the layers of a step, and which of them runs while something is allocated or kept.

A layer here is a convolution or linear layer with all that runs behind it until the next one begins: its norm, its
activation, pooling. Layers that run natively as one block cannot be told apart: what the block takes in passing counts
for its first layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn import SparseLayer

from .saved import SavedTensors, _Held, storage_key

MODEL = "(model)"  # what runs before the first layer, and parameters of no layer
UPDATE = "(optimizer)"


class LayerOrder:
    """Follows a forward by hooks on all leaf modules. Hooks make blocks run layer by layer, which keeps the same bytes.

    of_module: name of a leaf module -> the layer that it belongs to, in the order of their first calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.current = model, MODEL
        self.of_module: dict[str, str] = {}

    @contextmanager
    def followed(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(self._enter(name, module))
            for name, module in self.model.named_modules()
            if not any(True for _ in module.children())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module) -> Any:
        opens = isinstance(module, nn.Conv2d | nn.Linear | SparseLayer)

        def enter(*_: Any) -> None:
            if opens:
                self.current = name or MODEL
            self.of_module.setdefault(name, self.current)

        return enter

    def of_parameter(self, name: str) -> str:
        """The layer of a parameter, by its name in the model."""
        owner = name.rpartition(".")[0]
        return self.of_module.get(owner, MODEL)


class SavedByLayer(SavedTensors):
    """Saved tensors with the layer that was running when each storage was first kept."""

    def __init__(self, order: LayerOrder) -> None:
        super().__init__([order.model], keepers=False)
        self._order = order
        self._layer_of: dict[int, str] = {}

    def _pack(self, tensor: Tensor) -> _Held:
        held = super()._pack(tensor)
        self._layer_of[id(held)] = self._order.current
        return held

    def layers(self) -> dict[str, int]:
        """Bytes that are kept now, by layer, parameters and buffers left out."""
        constant = {storage_key(tensor) for tensor in self._constant_tensors()}
        found: dict[str, int] = {}
        for reference in self._held:
            held = reference()
            if held is None or held.parameter or storage_key(held.tensor) in constant:
                continue
            constant.add(storage_key(held.tensor))
            name = self._layer_of[id(held)]
            found[name] = found.get(name, 0) + int(held.tensor.untyped_storage().nbytes())
        return found


class Running:
    """The layer that an operator belongs to, by the weight that it reads, or in backward by the node that runs it."""

    def __init__(self, model: nn.Module, order: LayerOrder) -> None:
        self.current = MODEL
        self._nodes: dict[int, str] = {}
        self._weights: dict[int, str] = {}
        for name, module in model.named_modules():
            if name in order.of_module:
                for tensor in [*module._parameters.values(), *module._buffers.values()]:
                    if tensor is not None:
                        self._weights[storage_key(tensor)] = order.of_module[name]

    def enter(self, func: Any, tensors: list[Tensor]) -> str:
        """Note that `func` runs on `tensors`, and say in which layer."""
        if self.current == UPDATE:
            return UPDATE
        node = torch._C._current_autograd_node()
        if node is not None:
            self.current = self._nodes.get(node._sequence_nr(), self.current)
            return self.current
        keys = [storage_key(tensor) for tensor in tensors]
        read = next((self._weights[key] for key in keys if key in self._weights), None)
        self.current = self.current if read is None else read
        # Autograd numbers the node of an operator just before the operator itself runs.
        number = torch._C._autograd._get_sequence_nr() - 1
        if read is not None and "write_back" not in func._schema.name:
            self._nodes[number] = read
        else:
            self._nodes.setdefault(number, self.current)
        return self.current
