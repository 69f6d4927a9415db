"""Bytes that autograd keeps from forward to backward.

A tensor that an operation saves passes through `torch.autograd.graph.saved_tensors_hooks`. Every storage counts once
and in full (a saved view keeps all of its storage alive), whoever saved it and however often; parameters and buffers
count nothing, since they are alive anyway. What a graph drops before the forward is over is not kept and not counted.
Blind to tensors that a Function hides in a plain `ctx` attribute or a Python closure.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Kept:
    """One storage that autograd keeps, or that a parameter or buffer owns anyway (`constant`).

    `nbytes` is the size of the whole storage; `shapes` and `dtypes` describe the tensors saved from it; `keepers`
    are the modules in whose forward it was saved, innermost first, one tuple per saved tensor (empty: no module).
    """

    nbytes: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    keepers: tuple[tuple[nn.Module, ...], ...]
    constant: bool


class _Held:
    """What autograd keeps in place of a saved tensor; it dies with the graph that holds it.

    What has a node is detached: an output that its own node saves would otherwise hold that node, and the graph would
    never be released.
    """

    __slots__ = ("__weakref__", "keepers", "parameter", "tensor")

    def __init__(self, tensor: Tensor, keepers: tuple[nn.Module, ...]) -> None:
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self.parameter = isinstance(tensor, nn.Parameter)
        self.keepers = keepers


def calling_modules(depth: int = 1) -> tuple[nn.Module, ...]:
    """Modules whose methods are running, innermost first, read from the Python stack.

    Registers no hook: a hook would switch chains to their step-by-step path and so change what is kept.
    """
    found: list[nn.Module] = []
    frame = sys._getframe(depth)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (not found or found[-1] is not owner):
            found.append(owner)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return tuple(found)


class SavedTensors:
    """Context manager that records what autograd saves while it is open.

    `storages()` lists what is still kept at the time of the call, so the forward's result must be alive then.
    Looking for keepers makes Python (before 3.13) hold the local variables of running functions a little longer;
    without `keepers` nothing lives longer than it would, but parameters and buffers must be named as `constants`.
    """

    def __init__(self, constants: Iterable[Tensor | nn.Module] = (), keepers: bool = True) -> None:
        self._look = keepers
        self._held: list[weakref.ref[_Held]] = []
        self._constants = list(constants)
        self._roots: set[nn.Module] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> _Held:
        keepers = calling_modules(2) if self._look else ()
        if keepers:
            self._roots.add(keepers[-1])
        held = _Held(tensor, keepers)
        self._held.append(weakref.ref(held))
        return held

    def storages(self) -> list[Kept]:
        """What is kept now, in the order in which it was first saved."""
        constant = {storage_key(tensor) for tensor in self._constant_tensors()}
        groups: dict[int, list[_Held]] = {}
        for reference in self._held:
            held = reference()
            if held is not None:
                groups.setdefault(storage_key(held.tensor), []).append(held)
                if held.parameter:
                    constant.add(storage_key(held.tensor))
        return [_describe(group, key in constant) for key, group in groups.items()]

    def tensors(self) -> list[Tensor]:
        """The tensors that are kept now, parameters and buffers included."""
        return [held.tensor for reference in self._held if (held := reference()) is not None]

    def _constant_tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers of every module that was seen running, and what the caller named."""
        for item in [*self._constants, *self._roots]:
            if isinstance(item, nn.Module):
                yield from item.parameters()
                yield from item.buffers()
            else:
                yield item


class StepBytes(SavedTensors):
    """Context manager around a whole training step: `bytes` is what was kept when its backward began; None before.

    For loops of others, where forward and backward cannot be told apart from outside. What `model` holds is left out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__([model], keepers=False)
        self.bytes: int | None = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _unpack(self, held: _Held) -> Tensor:
        if self.bytes is None:  # the first tensor that backward asks for: all are still there
            self.bytes = sum(storage.nbytes for storage in self.storages() if not storage.constant)
        return held.tensor


def storage_key(tensor: Tensor) -> int:
    """Identity of a tensor's storage, valid while the tensor is alive; also for fake and meta tensors."""
    return int(tensor.untyped_storage()._cdata)


def _describe(group: list[_Held], constant: bool) -> Kept:
    return Kept(
        nbytes=int(group[0].tensor.untyped_storage().nbytes()),
        shapes=tuple(tuple(int(size) for size in held.tensor.shape) for held in group),
        dtypes=tuple(held.tensor.dtype for held in group),
        keepers=tuple(held.keepers for held in group),
        constant=constant,
    )


def saved_storages(
    fn: Callable[[], object], model: nn.Module | None = None, exclude: Iterable[Tensor | nn.Module] = ()
) -> list[Kept]:
    """Run `fn` and list the storages that autograd keeps for its backward, without parameters and buffers.

    `fn` is a forward that returns what the backward will start from (loss or output). Parameters and buffers of
    every module that runs in it are recognised by themselves; `model` and `exclude` (tensors or modules) name what
    is used functionally beside them, for example buffers passed to an operator by hand.
    """
    if not callable(fn):
        raise TypeError(
            f"Expected a function that runs a forward, got {type(fn).__name__}: pass lambda: model(x)."
        )
    constants = [*exclude, *([] if model is None else [model])]
    with SavedTensors(constants) as saved:
        result = fn()
    kept = [storage for storage in saved.storages() if not storage.constant]
    del result  # kept the graph alive until here
    return kept


def saved_bytes(
    fn: Callable[[], object], model: nn.Module | None = None, exclude: Iterable[Tensor | nn.Module] = ()
) -> int:
    """Bytes that autograd keeps from the forward `fn` to its backward; arguments as in `saved_storages`.

    >>> sb.memory.saved_bytes(lambda: loss_fn(model(x), y))
    """
    return sum(storage.nbytes for storage in saved_storages(fn, model, exclude))
