"""Memory of a training step, predicted without computing it.

A copy of the model on fake tensors (shapes and strides, no data) gets the selection and runs two whole steps. Saved
bytes are counted as `saved_bytes` counts them and equal the measured ones. Peak and transient follow the life of every
storage. What an operator takes inside itself is measured once per distinct call in this process, on the CPU; with it
the peak is not below the measured one, and above it only where a layer frees more than the fake run knows. A model on
the meta device is predicted as on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.nn.compact import CompactLayer

from .simulate import Run, call, fake_copy, fake_inputs, index_tensors, simulation
from .timeline import state_tensors, unique_bytes

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "sgd_momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters),
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters),
}


@dataclass(frozen=True)
class Prediction:
    """Bytes of one training step.

    saved: kept by autograd from forward to backward; grads: gradients; optimizer: optimizer state; velocity: what a
    velocity policy keeps of the probe; compact: compact parameters beside the full ones, and indices; transient: the
    most at any time beyond these kinds; peak: highest allocation of the step above what is alive before it
    (parameters, optimizer state, batch). The parts do not add up to the peak, since they are not at their highest at
    the same time. `layers`: saved bytes by the layer that kept them first.

    With `by_layer`, by convolution or linear layer together with what runs behind it (`owners.py`): saved_by, grads_by
    and optimizer_by, which add up to the totals; velocity_by; and transient_by, the most while that layer ran, forward
    or backward, whose largest is `transient`.
    """

    saved: int
    grads: int
    optimizer: int
    velocity: int
    compact: int
    transient: int
    peak: int
    layers: dict[str, int] = field(default_factory=dict)
    saved_by: dict[str, int] = field(default_factory=dict)
    grads_by: dict[str, int] = field(default_factory=dict)
    optimizer_by: dict[str, int] = field(default_factory=dict)
    velocity_by: dict[str, int] = field(default_factory=dict)
    transient_by: dict[str, int] = field(default_factory=dict)

    @property
    def needed(self) -> int:
        """What training takes at most beyond the network's own parameters and buffers and the batch."""
        return self.peak + self.compact + self.optimizer + self.velocity


def predict(
    model: nn.Module,
    selection: Any,
    example: Any,
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "sgd_momentum",
    loss: Callable[[Any], Tensor] | None = None,
    probe: Any = None,
    axis: str = "out",
    measure: str = "sketch",
    storage: torch.dtype | None = None,
    numbers: int | None = None,
    by_layer: bool = False,
) -> Prediction:
    """Predict the memory of a step of the converted `model` under `selection`, applied or not.

    Args:
        selection: a Selection or a plain mapping; None = what is applied now.
        example: the model's input, or a tuple or mapping of inputs; only shapes, dtypes and strides matter.
        optimizer: one of OPTIMIZERS, or a function from parameters to an optimizer.
        loss: from the model's output to a scalar. None: the sum of the output, and the loss keeps nothing.
        probe, axis: the images on which velocity will be measured, and its axis; None = no velocity.
        measure, storage, numbers: as in `VelocityPolicy`; None = its default.
        by_layer: also find out which layer takes what, which runs one more step.

    The model stays as it is: its values, its selection, its mode and the random state are not touched.

    Raises:
        ValueError: an unknown optimizer; no loss where the output has no floating-point tensor; a selection that does
            not fit; a model or loss that reads values (`.item()`, boolean indexing).
    """
    make = find_optimizer(optimizer)
    fake, mode = fake_copy(model)
    if selection is not None:
        from sparse_bwd.selection import apply

        apply(fake, selection)
    inputs = fake_inputs(example, mode)
    run = Run(fake, make, loss)
    with simulation(mode):
        run.first_step(inputs)
        parts = run.layered_step(inputs) if by_layer else {}
        line = run.watched_step(inputs)
    velocity = {} if probe is None else velocity_layers(model, probe, axis, measure, storage, numbers)
    copied = [module.copied_bytes for module in fake.modules() if isinstance(module, CompactLayer)]
    return Prediction(
        saved=sum(run.layers.values()),
        grads=run.grads,
        optimizer=unique_bytes(state_tensors(run.optimizer)),
        velocity=sum(velocity.values()),
        compact=unique_bytes(index_tensors(fake)) + sum(copied),
        transient=max(line.allocated["transient"]),
        peak=line.peak,
        layers=run.layers,
        saved_by=parts.get("saved", {}),
        grads_by=parts.get("grads", {}),
        optimizer_by=parts.get("optimizer", {}),
        velocity_by=velocity if by_layer else {},
        transient_by=run.transient_layers,
    )


def find_optimizer(
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer],
) -> Callable[[list[nn.Parameter]], Optimizer]:
    """The function from parameters to an optimizer that a word of OPTIMIZERS stands for; a function as it is."""
    make = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if make is None:
        raise ValueError(
            f"Unknown optimizer {optimizer!r}; known are {', '.join(OPTIMIZERS)}, or pass a function."
        )
    return make


def _kept_bytes(
    measure: str, storage: torch.dtype | None, numbers: int | None
) -> Callable[[Tensor, int, bool], int]:
    """Bytes that a velocity policy keeps of a response, given its channels and whether it is its layer's first."""
    from sparse_bwd.selection.policies import make_meter
    from sparse_bwd.selection.sketch import NUMBERS, SketchMeter

    meter = make_meter(measure, storage, NUMBERS if numbers is None else numbers, seed=0)
    size = meter.storage.itemsize
    if isinstance(meter, SketchMeter):
        per_channel = meter.numbers * size
        return lambda response, channels, first: channels * per_channel if first else 0
    return lambda response, channels, first: response.numel() * size


def velocity_layers(
    model: nn.Module,
    probe: Any,
    axis: str = "out",
    measure: str = "sketch",
    storage: torch.dtype | None = None,
    numbers: int | None = None,
) -> dict[str, int]:
    """Bytes that a velocity policy with these settings holds between its steps, by layer; arguments as in `predict`.

    What is kept of the responses to the probe, and three float64 numbers per channel (selection/velocity.py).
    """
    from sparse_bwd.nn import SparseLayer, layers

    fake, mode = fake_copy(model)
    bytes_of = _kept_bytes(measure, storage, numbers)
    swapped = {layer: name for name, layer in layers(fake).items() if layer.selectable}
    sizes = {name: 3 * 8 * layer.num_channels(axis) for layer, name in swapped.items()}
    called: set[nn.Module] = set()

    def record(layer: SparseLayer, args: tuple[Any, ...], output: Tensor) -> None:
        kept = output if axis == "out" or layer.one_axis else args[0]
        sizes[swapped[layer]] += bytes_of(kept, layer.num_channels(axis), layer not in called)
        called.add(layer)

    handles = [layer.register_forward_hook(record) for layer in swapped]
    with simulation(mode), torch.no_grad():
        call(fake, fake_inputs(probe, mode))
    for handle in handles:
        handle.remove()
    return sizes
