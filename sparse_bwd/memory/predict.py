"""Memory of a training step, predicted without computing it.

A copy of the model on fake tensors (shapes and strides, no data) gets the selection and runs two whole steps. Saved
bytes are counted as `saved_bytes` counts them and equal the measured ones. Peak and transient follow the life of every
fake storage; they are estimates: what one operator allocates and frees inside itself is not seen, and is added for CPU
convolutions from a rule (`scratch.py`).
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .events import Event
from .saved import SavedTensors, storage_key
from .scratch import scratch_bytes
from .timeline import Timeline, stack, state_tensors, unique_bytes

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
    velocity policy keeps of the probe; transient: the most at any time beyond these kinds; peak: highest allocation of
    the step above what is alive before it (parameters, optimizer state, batch). The parts do not add up to the peak,
    since they are not at their highest at the same time. `layers`: saved bytes by the layer that kept them first.
    """

    saved: int
    grads: int
    optimizer: int
    velocity: int
    transient: int
    peak: int
    layers: dict[str, int] = field(default_factory=dict)


def predict(
    model: nn.Module,
    selection: Any,
    example: Any,
    optimizer: str | Callable[[list[nn.Parameter]], Optimizer] = "sgd_momentum",
    loss: Callable[[Any], Tensor] | None = None,
    probe: Any = None,
    axis: str = "out",
) -> Prediction:
    """Predict the memory of a step of the converted `model` under `selection`, applied or not.

    Args:
        selection: a Selection or a plain mapping; None = what is applied now.
        example: the model's input, or a tuple or mapping of inputs; only shapes, dtypes and strides matter.
        optimizer: one of OPTIMIZERS, or a function from parameters to an optimizer.
        loss: from the model's output to a scalar. None: the sum of the output, and the loss keeps nothing.
        probe, axis: the images on which velocity will be measured, and its axis; None = no velocity.

    The model stays as it is: its values, its selection, its mode and the random state are not touched.

    Raises:
        ValueError: an unknown optimizer; no loss where the output has no floating-point tensor; a selection that does
            not fit; a model or loss that reads values (`.item()`, boolean indexing).
    """
    make = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
    if make is None:
        raise ValueError(
            f"Unknown optimizer {optimizer!r}; known are {', '.join(OPTIMIZERS)}, or pass a function."
        )
    fake, mode = fake_copy(model)
    if selection is not None:
        from sparse_bwd.selection import apply

        apply(fake, selection)
    inputs = _map(example, mode.from_tensor)
    run = _Run(fake, make, loss)
    with mode, _clear_refusal():
        run.first_step(inputs)
        line = run.watched_step(inputs)
        velocity = _velocity_bytes(fake, _map(probe, mode.from_tensor), axis) if probe is not None else 0
    return Prediction(
        saved=sum(run.layers.values()),
        grads=run.grads,
        optimizer=unique_bytes(state_tensors(run.optimizer)),
        velocity=velocity,
        transient=max(line.allocated["transient"]),
        peak=line.peak,
        layers=run.layers,
    )


@contextlib.contextmanager
def _clear_refusal() -> Iterator[None]:
    """Say what to do where a model needs values, not only shapes."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"The step reads values ({error.func}), which a prediction without data cannot follow; "
            "apply the selection and measure with saved_bytes and peak_bytes instead."
        ) from error


def fake_copy(model: nn.Module) -> tuple[nn.Module, Any]:
    """A copy of the model whose parameters and buffers hold no data, and the fake mode that it lives in."""
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    # Indices of a selection stay real, the model's own: they are small, only read, and their values are needed.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    attributes = [
        {
            key: value
            for key, value in module.__dict__.items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        for module in model.modules()
    ]
    indices = {id(tensor): tensor for tensor in _tensors(attributes) if tensor.dtype is torch.int64}
    with FakeCopyMode(mode):
        return copy.deepcopy(model, dict(indices)), mode


class _Run:
    """Training steps of a fake model: what they keep, and what they allocate when."""

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[list[nn.Parameter]], Optimizer],
        loss: Callable[[Any], Tensor] | None,
    ) -> None:
        self.model, self.loss = model, loss
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make(self.trained) if self.trained else None
        self.names = {module: name for name, module in model.named_modules()}
        self.layers: dict[str, int] = {}
        self.grads = 0

    def step(self, inputs: Any, saved: SavedTensors, on_saved: Callable[[SavedTensors], None]) -> None:
        """One step, from forward to `zero_grad`; `on_saved` is called when forward and loss are over."""
        with saved:
            output = call(self.model, inputs)
            value = None if self.loss is None else self.loss(output)
        on_saved(saved)
        value = _sum(output) if value is None else value
        del output
        if self.optimizer is None or not value.requires_grad:
            return
        value.backward()
        self.grads = unique_bytes([p.grad for p in self.trained if p.grad is not None])
        self._update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)

    def first_step(self, inputs: Any) -> None:
        """A step that creates the optimizer's state and fills `layers`."""

        def on_saved(saved: SavedTensors) -> None:
            for kept in saved.storages():
                if not kept.constant:
                    chain = kept.keepers[0]
                    name = self.names.get(chain[0], "") if chain else ""
                    self.layers[name] = self.layers.get(name, 0) + kept.nbytes

        self.step(inputs, SavedTensors(), on_saved)

    def _update(self, optimizer: Optimizer) -> None:
        """An optimizer step, as far as it goes without data."""
        from torch._subclasses.fake_tensor import DataDependentOutputException

        with contextlib.suppress(DataDependentOutputException):
            # Adagrad, for one, reads its step count; its state exists by then, its intermediate results go unseen.
            optimizer.step()

    def watched_step(self, inputs: Any) -> Timeline:
        """A step whose allocations are followed."""
        watch = _Allocations()

        def on_saved(saved: SavedTensors) -> None:
            for tensor in saved.tensors():
                watch.mark("activation", tensor)

        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p: watch.mark("gradient", p.grad))
            for parameter in self.trained
        ]
        with watch:
            self.step(inputs, SavedTensors(keepers=False), on_saved)
        for handle in handles:
            handle.remove()
        return stack(watch.events, {})


class _Allocations(TorchDispatchMode):
    """Follows the life of every storage that an operator returns while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._alive: dict[int, weakref.ref[Any]] = {}

    def mark(self, kind: str, tensor: Tensor | None) -> None:
        """Say what the storage of a tensor holds."""
        if tensor is not None:
            self.events.append(Event(len(self.events), storage_key(tensor), 0, kind))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage_key(tensor) for tensor in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        scratch = scratch_bytes(func, args, result)
        for key, tensor in {storage_key(tensor): tensor for tensor in _tensors(result)}.items():
            if key not in known:
                self._watch(key, tensor.untyped_storage())
        if scratch:
            self._passing(scratch)
        return result

    def _watch(self, key: int, storage: torch.UntypedStorage) -> None:
        size = int(storage.nbytes())
        self.events.append(Event(len(self.events), key, size))

        def released(_: Any) -> None:
            self._alive.pop(key, None)
            self.events.append(Event(len(self.events), key, -size))

        self._alive[key] = weakref.ref(storage, released)

    def _passing(self, size: int) -> None:
        """Memory that an operator takes inside itself and gives back."""
        self.events.append(Event(len(self.events), -1, size))
        self.events.append(Event(len(self.events), -1, -size))


def _velocity_bytes(model: nn.Module, probe: Any, axis: str) -> int:
    """Responses kept on the probe, fp32 (selection/velocity.py), and three float64 numbers per channel."""
    from sparse_bwd.nn import SparseConv2d, layers

    sizes: list[int] = []

    def record(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        depthwise = isinstance(layer, SparseConv2d) and layer.depthwise
        kept = output if axis == "out" or depthwise else args[0]
        sizes.append(kept.numel() * torch.float32.itemsize)

    measured = [layer for layer in layers(model).values() if layer.selectable]
    handles = [layer.register_forward_hook(record) for layer in measured]
    with torch.no_grad():
        call(model, probe)
    for handle in handles:
        handle.remove()
    return sum(sizes) + sum(3 * 8 * layer.num_channels(axis) for layer in measured)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a tensor, a tuple or list of positional inputs, or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _map(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, function, inputs)


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def _sum(output: Any) -> Tensor:
    """A scalar that reaches every floating-point tensor of the output."""
    parts = [tensor.sum() for tensor in _tensors(output) if tensor.is_floating_point()]
    if not parts:
        raise ValueError("The model returned no floating-point tensor; pass loss=, a function to a scalar.")
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]
