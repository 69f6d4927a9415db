"""The least that a layer must move and compute in a step, forward and backward, from shapes alone.

e = bytes per element, X and Y elements of input and output, W weights, P = Y / C_out; x' the part of x that dw reads,
y' the selected part of dy (all of it where dx is computed), dw the weights that get a gradient.

    convolution, linear   forward   bytes  e (X + W + Y)            operations  2 W P
                          backward  bytes  e (y' + x' + dw)                     2 dw P       if any weight is trained
                                    and    e (W + X)                            2 W P        if dx is asked for
    norm, activation      as `affine_act` and `affine_act_dx` of measure/work.py, less 2 e X behind a convolution or
                          linear layer that they run as one with: there they write in place what is in the cache
    all others            forward   bytes  e (X + Y)                            not counted
                          backward  bytes  e (X + Y)                            if dx is asked for

Every layer reads its input and writes its output, also inside a native block. Not counted: what a stock layer keeps
beside its input, the bias, vectors of channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparse_bwd.measure.shapes import Call, calls_in
from sparse_bwd.measure.training_step import DTYPES, TrainingStep
from sparse_bwd.measure.work import Work, affine_dx_work, affine_work
from sparse_bwd.memory.simulate import fake_copy, simulation
from sparse_bwd.nn import SparseConv2d, SparseLinear
from sparse_bwd.nn.affine_act import BatchNorm2d, activation_of

NOTHING = Work(0, 0)


def calls_of(step: TrainingStep) -> list[Call]:
    """Calls of the leaf modules in a forward of the step, on fake tensors."""
    x, low = step.variant.x, DTYPES[step.dtype]
    fake, mode = fake_copy(step.variant.model)

    def forward() -> None:
        automatic = torch.autocast(x.device.type, low, enabled=low is not None)
        with simulation(mode), torch.enable_grad(), automatic:
            fake(mode.from_tensor(x))

    return calls_in(fake, forward)


def works(names: Iterable[str], calls: Mapping[str, list[Call]]) -> list[tuple[Work, Work]]:
    """Forward and backward of every call of some layers, which run as one if they are several.

    Args:
        calls: of the leaf modules by name.
    """
    found, fused = [], False
    for name in names:
        for call in calls.get(name, ()):
            found.append(work_of(call, fused))
        fused = fused or any(isinstance(call.module, nn.Conv2d | nn.Linear) for call in calls.get(name, ()))
    return found


def work_of(call: Call, fused: bool) -> tuple[Work, Work]:
    """Forward and backward of a call; `fused`: right behind a layer that it runs as one with."""
    module = call.module
    if isinstance(module, nn.Conv2d | nn.Linear):
        return _product(call, module)
    act = activation_of(module)
    norm = isinstance(module, BatchNorm2d) and module.on_running_statistics
    if act is not None or norm:
        return _affine(call, norm, fused)
    moved = call.itemsize * (call.x_elements + call.y_elements)
    return Work(moved, 0), Work(moved, 0) if call.x_needs and call.y_needs else NOTHING


def _product(call: Call, layer: nn.Conv2d | nn.Linear) -> tuple[Work, Work]:
    weight = layer._parameters["weight"]
    assert weight is not None
    e, x, y = call.itemsize, call.x_elements, call.y_elements
    positions = y // len(weight)
    forward = Work(e * (x + weight.numel() + y), 2 * weight.numel() * positions)
    trained, kept, selected = _selected(layer, weight)
    wants_dx = call.x_needs
    moved = e * ((weight.numel() + x) * wants_dx)
    if trained:
        moved += e * (round(x * kept) + trained)
    if trained or wants_dx:
        moved += e * (y if wants_dx else round(y * selected))
    operations = 2 * positions * (trained + weight.numel() * wants_dx)
    return forward, Work(moved, operations)


def _selected(layer: nn.Module, weight: Tensor) -> tuple[int, float, float]:
    """Weights that get a gradient, and the shares of the channels of x and of dy that it reads."""
    if not isinstance(layer, SparseConv2d | SparseLinear):
        return weight.numel() * weight.requires_grad, 1.0, 1.0
    part, index = layer._parameters["trainable_weight"], layer.channels
    if part is None:
        return 0, 0.0, 0.0
    share = 1.0 if index is None else index.numel() / layer.num_channels(layer.axis)
    if isinstance(layer, SparseConv2d):
        keep, rows = layer._plan.keep, layer._plan.rows
        return (
            part.numel(),
            1.0 if keep is None else keep.numel() / layer.in_channels,
            1.0 if rows is None else rows.numel() / layer.out_channels,
        )
    return part.numel(), share if layer.axis == "in" else 1.0, share if layer.axis == "out" else 1.0


def _affine(call: Call, norm: bool, fused: bool) -> tuple[Work, Work]:
    """A norm on running statistics, or an activation."""
    elements, channels = call.x_elements, call.x_shape[1] if norm else 0
    keeps_flags = not norm and call.y_needs
    forward = affine_work(elements, channels, call.itemsize, keeps_flags)
    backward = NOTHING
    if call.y_needs:
        shift = norm and call.module._parameters["trainable_bias"] is not None
        backward = affine_dx_work(elements, channels, call.itemsize, keeps_flags, shift)
    in_place = 2 * call.itemsize * elements * fused
    return (
        Work(forward.bytes - in_place, forward.operations),
        Work(max(backward.bytes - in_place, 0), backward.operations),
    )
