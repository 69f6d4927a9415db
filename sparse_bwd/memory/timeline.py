"""Allocated bytes over one training step, by kind.

The allocator's events say when a block comes and goes. What it holds is learnt on the way: autograd's saved tensors
are activations, what arrives in `.grad` is a gradient, what lies in `optimizer.state` afterwards is optimizer state.
The rest is transient: dx and dy, what operators need inside, the optimizer's intermediate results.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .events import PART, Event, mark, mark_part, record
from .saved import storage_key

KINDS = ("parameter", "optimizer", "gradient", "activation", "transient")


@dataclass(frozen=True)
class Timeline:
    """Allocated bytes per kind after each allocator event; all lists have one length.

    `ms` counts from the first event. Kind "parameter" is constant: parameters and buffers of the model. `parts`: when
    each part of the step began, if it was run in parts.
    """

    ms: list[float]
    allocated: dict[str, list[int]]
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> list[int]:
        """Bytes allocated at each time, all kinds together."""
        return [sum(values) for values in zip(*self.allocated.values(), strict=True)]

    @property
    def peak(self) -> int:
        """Highest allocation above what was alive before the step."""
        total = self.total
        return max(total) - total[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; times in ms, sizes in bytes."""
        parts = {"parts": self.parts} if self.parts else {}
        return {"ms": self.ms, "bytes": self.allocated, "peak": self.peak, **parts}


def timeline(
    step: Callable[[], object] | Mapping[str, Callable[[], object]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> Timeline:
    """Run `step` once (forward to `zero_grad`; or its parts by name, in order) and return what was allocated when.

    Gradients must be cleared before, since the release of an older block leaves no event.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.grad is not None for parameter in trained):
        raise ValueError(
            "Gradients are pending: call optimizer.zero_grad(set_to_none=True) before timeline()."
        )
    start = dict.fromkeys(KINDS, 0)
    start["parameter"] = unique_bytes([*model.parameters(), *model.buffers()])
    start["optimizer"] = unique_bytes(state_tensors(optimizer))
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    constant = {storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in constant:
            mark("activation", tensor)
        return tensor.detach()  # an output that its own node saves must not hold that node

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for name, part in step.items() if isinstance(step, Mapping) else [("", step)]:
                if name:
                    mark_part(name)
                part()
        for tensor in state_tensors(optimizer):
            mark("optimizer", tensor)

    handles = [parameter.register_post_accumulate_grad_hook(_mark_gradient) for parameter in trained]
    try:
        events = record(run, device)
    finally:
        for handle in handles:
            handle.remove()
    return stack(events, start)


def _mark_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        mark("gradient", parameter.grad)


def state_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Tensors of an optimizer's state."""
    states = optimizer.state.values() if optimizer is not None else ()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors, each once."""
    return sum({storage_key(tensor): int(tensor.untyped_storage().nbytes()) for tensor in tensors}.values())


def stack(events: list[Event], start: dict[str, int]) -> Timeline:
    """Running sums per kind, from `start` (0 where absent).

    A mark names a block for its whole life, also for the time before the mark.
    """
    kind_of = _kinds_of_blocks(events)
    level = {kind: start.get(kind, 0) for kind in KINDS}
    ms, allocated = [0.0], {kind: [level[kind]] for kind in KINDS}
    origin = events[0].time if events else 0
    parts: dict[str, float] = {}
    for event, kind in zip(events, kind_of, strict=True):
        if event.kind.startswith(PART):
            parts[event.kind[len(PART) :]] = (event.time - origin) / 1e6
        if event.nbytes == 0:
            continue
        level[kind] += event.nbytes
        ms.append((event.time - origin) / 1e6)
        for name in KINDS:
            allocated[name].append(level[name])
    return Timeline(ms, allocated, parts)


def _kinds_of_blocks(events: list[Event]) -> list[str]:
    """Kind of the block of each event, in order."""
    alive: dict[int, int] = {}  # address -> number of the block
    block_of: list[int] = []
    kinds: list[str] = []  # of each block
    for event in events:
        if event.kind:
            block = alive.get(event.address, -1)
            # A gradient may have been saved by somebody before: the later name is the better one.
            if block >= 0:
                kinds[block] = event.kind
        elif event.nbytes > 0:
            block = alive[event.address] = len(kinds)
            kinds.append("transient")
        else:
            block = alive.pop(event.address, -1)
        block_of.append(block)
    return [kinds[block] if block >= 0 else "transient" for block in block_of]
