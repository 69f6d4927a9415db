"""Training steps on fake tensors: shapes and strides without data, whose every allocation is followed.

What one operator allocates and frees inside itself no fake run sees; it is measured (`scratch.py`).
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_bwd.ops.backend import simulated

from .events import Event
from .owners import UPDATE, LayerOrder, Running, SavedByLayer
from .saved import SavedTensors, storage_key
from .scratch import scratch_bytes
from .timeline import Timeline, stack, unique_bytes

Optimizer = torch.optim.Optimizer


@contextlib.contextmanager
def simulation(mode: Any) -> Iterator[None]:
    """Say what to do where a model needs values, not only shapes."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    try:
        with mode, simulated():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"The step reads values ({error.func}), which a prediction without data cannot follow; "
            "apply the selection and measure with saved_bytes and peak_bytes instead."
        ) from error


def fake_copy(model: nn.Module) -> tuple[nn.Module, Any]:
    """A copy of the model whose parameters and buffers hold no data, and the fake mode that it lives in.

    A model on the meta device stands for one on the CPU.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    # Indices of a selection stay real, the model's own: they are small, only read, and their values are needed.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    indices = {id(tensor): tensor for tensor in index_tensors(model)}
    with FakeCopyMode(mode):
        return copy.deepcopy(model, {**indices, **_in_place_of_meta(model, mode)}), mode


def _in_place_of_meta(model: nn.Module, mode: Any) -> dict[int, Tensor]:
    """Fake tensors on the CPU by the id of the meta tensor whose place they take, as `copy.deepcopy` wants them."""
    found: dict[int, Tensor] = {}
    made: dict[Any, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != "meta":
            continue
        # A layer that is trained whole holds one memory twice.
        memory = (storage_key(tensor), tensor.shape, tensor.stride(), tensor.storage_offset())
        fake = made.setdefault(memory, fake_tensor(tensor, mode)).detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return found


def fake_inputs(inputs: Any, mode: Any) -> Any:
    """Model inputs whose tensors hold no data."""
    return map_tensors(inputs, lambda tensor: fake_tensor(tensor, mode))


def fake_tensor(tensor: Tensor, mode: Any) -> Tensor:
    """A fake tensor like a real one; like one of the meta device, but on the CPU."""
    fake: Tensor
    if tensor.device.type != "meta":
        fake = mode.from_tensor(tensor)
        return fake
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return fake


def index_tensors(model: nn.Module) -> list[Tensor]:
    """The int64 tensors that modules hold beside parameters and buffers: indices of a selection."""
    attributes = [
        {
            key: value
            for key, value in module.__dict__.items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        for module in model.modules()
    ]
    slots = [slot.index for module in model.modules() for slot in getattr(module, "_slots", {}).values()]
    return [tensor for tensor in tensors_of([attributes, slots]) if tensor.dtype is torch.int64]


class Run:
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
        self.reached: set[nn.Parameter] = set()  # that got a gradient in the last step
        self.running: Running | None = None  # who owns what a watched step allocates, if that is asked
        self.transient_layers: dict[str, int] = {}

    def step(self, inputs: Any, saved: SavedTensors, on_saved: Callable[[SavedTensors], None]) -> None:
        """One step, from forward to `zero_grad`; `on_saved` is called when forward and loss are over."""
        with saved:
            output = call(self.model, inputs)
            value = None if self.loss is None else self.loss(output)
        on_saved(saved)
        value = scalar_of(output) if value is None else value
        del output
        if self.optimizer is None or not value.requires_grad:
            return
        value.backward()
        self.reached = {p for p in self.trained if p.grad is not None}
        self.grads = unique_bytes([p.grad for p in self.reached if p.grad is not None])
        if self.running is not None:
            self.running.current = UPDATE
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
        watch = _Allocations(self.running)

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
        line = stack(watch.events, {})
        self.transient_layers = watch.highest_by_layer(line.allocated["transient"])
        return line

    def layered_step(self, inputs: Any) -> dict[str, dict[str, int]]:
        """Saved bytes, gradients and optimizer state by layer; the next watched step tells its transient bytes too."""
        order = LayerOrder(self.model)
        saved = SavedByLayer(order)
        found: dict[str, dict[str, int]] = {"saved": {}, "grads": {}, "optimizer": {}}

        def on_saved(_: SavedTensors) -> None:
            found["saved"] = saved.layers()

        with order.followed():
            self.step(inputs, saved, on_saved)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad or self.optimizer is None:
                continue
            layer = order.of_parameter(name)
            state = self.optimizer.state.get(parameter, {}).values()
            kept = unique_bytes([value for value in state if isinstance(value, Tensor)])
            size = parameter.nbytes if parameter in self.reached else 0
            found["grads"][layer] = found["grads"].get(layer, 0) + size
            found["optimizer"][layer] = found["optimizer"].get(layer, 0) + kept
        self.running = Running(self.model, order)
        return found


class _Allocations(TorchDispatchMode):
    """Follows the life of every storage that an operator returns while the mode is on."""

    def __init__(self, running: Running | None = None) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._running = running
        self._entered: list[tuple[int, str]] = []  # from which event on each layer ran
        self._alive: dict[int, weakref.ref[Any]] = {}

    def mark(self, kind: str, tensor: Tensor | None) -> None:
        """Say what the storage of a tensor holds."""
        if tensor is not None:
            self.events.append(Event(len(self.events), storage_key(tensor), 0, kind))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_of((args, kwargs or {}))
        known = {storage_key(tensor) for tensor in given}
        if self._running is not None:
            self._entered.append((len(self.events), self._running.enter(func, given)))
        result = func(*args, **(kwargs or {}))
        scratch = scratch_bytes(func, args, kwargs or {})
        for key, tensor in {storage_key(tensor): tensor for tensor in tensors_of(result)}.items():
            if key not in known:
                self._watch(key, tensor.untyped_storage())
        if scratch:
            self._passing(scratch)
        return result

    def highest_by_layer(self, levels: list[int]) -> dict[str, int]:
        """The highest of `levels` (one at the start, then one per event that is not a mark) while each layer ran."""
        highest: dict[str, int] = {}
        entered = iter([*self._entered, (len(self.events), "")])
        layer, (following, name) = "", next(entered)
        at = 0
        for number, event in enumerate(self.events):
            while following <= number:
                layer = name
                following, name = next(entered)
            at += event.nbytes != 0
            if layer and event.nbytes > 0:
                highest[layer] = max(highest.get(layer, 0), levels[at])
        return highest

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


def call(model: nn.Module, inputs: Any) -> Any:
    """Run the model on a tensor, a tuple or list of positional inputs, or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def map_tensors(inputs: Any, function: Callable[[Tensor], Any]) -> Any:
    """`inputs` with `function` applied to every tensor in it."""
    return torch.utils._pytree.tree_map_only(Tensor, function, inputs)


def tensors_of(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def scalar_of(output: Any) -> Tensor:
    """A scalar that reaches every floating-point tensor of the output."""
    parts = [tensor.sum() for tensor in tensors_of(output) if tensor.is_floating_point()]
    if not parts:
        raise ValueError("The model returned no floating-point tensor; pass loss=, a function to a scalar.")
    return torch.stack(parts).sum() if len(parts) > 1 else parts[0]
