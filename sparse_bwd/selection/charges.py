"""What each channel costs in a training step: the fixed charges of `knapsack.py`, in bytes and in operations.

    bytes       channel   w e (2 + s) + 8   copy, gradient and s numbers of optimizer state for each of its w weights,
                          + e X / C         and its index; on axis "in" and in depthwise layers its slice of the input
                layer     e X               the whole input, on axis "out", once for all layers that keep the same one;
                                            neither that nor a slice where it is made again (`nn/recompute.py`)
                depth     all that anybody else keeps behind the first open layer: masks, offsets, vectors
    operations  channel   2 w P             its weight gradient; P: images x positions of the output
                depth     2 W P             dx of every layer behind the first open one, of W weights

One forward on fake tensors, in which every layer is open, finds X, P and what is kept. The bytes leave out what changes
with the order of events (`memory.predict` knows it): they compare selections, and `limits.py` corrects their level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.memory.saved import calling_modules, storage_key
from sparse_bwd.memory.simulate import call, fake_copy, fake_inputs, simulation
from sparse_bwd.memory.timeline import state_tensors, unique_bytes
from sparse_bwd.nn import SparseLayer, layers
from sparse_bwd.nn.recompute import origin_of
from sparse_bwd.selection.apply import apply
from sparse_bwd.selection.costs import CostTable
from sparse_bwd.selection.knapsack import Charges
from sparse_bwd.selection.selection import Channels, Selection

Optimizer = torch.optim.Optimizer


@dataclass(frozen=True)
class Costs:
    """Charges of the layers in the order in which the forward calls them.

    order: [L] the place of each layer in the table; bytes, flops: its charges.
    """

    order: Tensor
    bytes: Charges
    flops: Charges

    def of(self, unit: str) -> Charges:
        """Charges in a unit, "bytes" or "flops"."""
        return self.bytes if unit == "bytes" else self.flops


def channel_costs(
    model: nn.Module,
    table: CostTable,
    batch: Any,
    make: Callable[[list[nn.Parameter]], Optimizer],
    bias: str = "selected",
) -> Costs:
    """Costs of the channels of `table` in a step on `batch` with the optimizer that `make` makes.

    Args:
        batch: model input: a tensor, a tuple or list of arguments, or a dict of keyword arguments; only shapes matter.
        bias: which biases go with selected channels; see `Channels`.
    """
    fake, mode = fake_copy(model)
    apply(fake, Selection({name: Channels(None, table.axis, bias) for name in table.names}))
    watch = _Watch(fake, table)
    with simulation(mode), torch.enable_grad():
        watch.run(fake_inputs(batch, mode))
    order = sorted(range(len(table.names)), key=lambda i: watch.first.get(i, len(table.names)))
    swapped = layers(fake)
    layer_of = [swapped[table.names[i]] for i in order]
    itemsize = [layer.weight.element_size() for layer in layer_of]
    state = 2 + state_numbers(make)
    unit = [
        table.unit[i] * size * state + 8 + watch.slice_bytes.get(i, 0)
        for i, size in zip(order, itemsize, strict=True)
    ]
    # The storages that layers keep whole, numbered.
    inputs = {key: number for number, key in enumerate(dict.fromkeys(watch.whole.values()))}
    group = [inputs[watch.whole[i]] if i in watch.whole else len(inputs) for i in order]
    positions = [watch.positions.get(i, 0) for i in order]
    weights = [layer.weight.numel() for layer in layer_of]
    dx = _double([2 * w * p for w, p in zip(weights, positions, strict=True)])
    groups = torch.tensor(group)
    return Costs(
        order=torch.tensor(order),
        bytes=Charges(
            _double(unit), groups, _double([watch.charge(key) for key in inputs] + [0]), watch.behind(order)
        ),
        flops=Charges(
            _double([max(2 * table.unit[i] * p, 1) for i, p in zip(order, positions, strict=True)]),
            groups,
            torch.zeros(len(inputs) + 1, dtype=torch.float64),
            dx.flip(0).cumsum(0).flip(0) - dx,
        ),
    )


def state_numbers(make: Callable[[list[nn.Parameter]], Optimizer]) -> float:
    """Numbers of optimizer state per trained number: 0 for plain SGD, 1 with momentum, 2 for Adam."""
    count = 4096
    parameter = nn.Parameter(torch.zeros(count))
    optimizer = make([parameter])
    parameter.grad = torch.zeros(count)
    optimizer.step()
    return unique_bytes(state_tensors(optimizer)) // 4 / count


class _Watch:
    """One forward with every layer open. All by the layer's place in the table.

    first: number of the layer's first call; slice_bytes: of one channel of the input, where the layer keeps slices;
    whole: the storage of the input, where it keeps that whole; positions: images x positions of the output.
    """

    def __init__(self, model: nn.Module, table: CostTable) -> None:
        self.model, self.axis = model, table.axis
        swapped = layers(model)
        self.place = {swapped[name]: i for i, name in enumerate(table.names)}
        self.channels = table.sizes
        self.first: dict[int, int] = {}
        self.slice_bytes: dict[int, int] = {}
        self.whole: dict[int, int] = {}
        self.positions: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._others: dict[
            int, int
        ] = {}  # storage that something else keeps -> layers called before it was kept
        self._alive: list[Tensor] = []  # a key names a storage only as long as the storage lives
        self._constant = {storage_key(t) for t in [*model.parameters(), *model.buffers()]}

    def run(self, inputs: Any) -> None:
        # Hooks also make blocks of layers run layer by layer, which keeps the same.
        handles = [layer.register_forward_hook(self._called, with_kwargs=True) for layer in self.place]
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            call(self.model, inputs)
        for handle in handles:
            handle.remove()

    def _called(
        self, layer: SparseLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        i = self.place[layer]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        self._alive.append(x)
        self.first.setdefault(i, len(self.first))
        self.positions[i] = self.positions.get(i, 0) + layer.positions(x, output)
        if origin_of(x) is not None:
            return  # made again from what the layer before keeps in any case
        if self.axis == "in" or layer.one_axis:
            size = x.numel() * x.element_size() // self.channels[i]
            self.slice_bytes[i] = self.slice_bytes.get(i, 0) + size
        else:
            # The touched groups of a grouped layer are a copy of its own; at most as large as the input.
            key = storage_key(x) if layer.groups == 1 else -1 - i
            self.whole[i] = key
            self._sizes[key] = x.untyped_storage().nbytes()

    def _pack(self, tensor: Tensor) -> Tensor:
        key = storage_key(tensor)
        keeper = next(iter(calling_modules(2)), None)
        if key not in self._constant and keeper not in self.place:
            self._others.setdefault(key, len(self.first))
            self._sizes[key] = tensor.untyped_storage().nbytes()
        kept = tensor if tensor.grad_fn is None else tensor.detach()
        self._alive.append(kept)
        return kept

    def charge(self, key: int) -> int:
        """Bytes that keeping the input `key` takes; nothing if something else keeps it anyway."""
        return 0 if key in self._others else self._sizes[key]

    def behind(self, order: list[int]) -> Tensor:
        """Bytes that others keep behind each layer, in forward order [L]; without what they keep in any case."""
        kept = [0] * (len(self.first) + 1)  # by the number of layers called before
        for key, before in self._others.items():
            kept[before] += self._sizes[key]
        after = list(accumulate(reversed(kept)))[::-1]
        # The classifier's input and what lies behind the last layer are kept whatever is selected.
        least = after[-1]
        return _double([after[self.first[i] + 1] - least if i in self.first else 0 for i in order])


def _double(values: list[float] | list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
