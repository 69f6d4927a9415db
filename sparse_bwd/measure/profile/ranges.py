"""Named ranges around what really runs in a training step: layers, blocks of layers, and the backward of each.

No module gets a hook, which would make chains run layer by layer. A call of a module is seen where `nn.Module` is
called, layers that run as one tell `nn/ranges.py`, and backward is seen at the nodes of autograd's graph that a
layer made: hooks before and behind a node compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparse_bwd.nn import ranges

FORWARD, BACKWARD = "forward", "backward"
_MARK = "sparse_bwd.range"


class Range(NamedTuple):
    """What runs: a phase of some layers. No layers: the phase as a whole; `inside`: they have layers inside them."""

    phase: str
    layers: tuple[str, ...] = ()
    inside: bool = False

    def __str__(self) -> str:
        return f"{self.phase}: {', '.join(self.layers)}" if self.layers else self.phase


class Sink(Protocol):
    """Who is told when ranges begin and end; they nest."""

    def begin(self, what: Range) -> None: ...

    def end(self) -> None: ...


class Ranges:
    """Tells a sink of the ranges of a model's steps. Times and graphs change by the calls of the sink alone."""

    def __init__(self, model: nn.Module, sink: Sink) -> None:
        self.sink = sink
        self._names = {module: name or f"({type(model).__name__})" for name, module in model.named_modules()}
        self._open: list[tuple[nn.Module, ...]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, calls of the model's modules are ranges."""
        plain = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module not in self._names:
                return plain(module, *args, **kwargs)
            return self._run((module,), lambda: plain(module, *args, **kwargs), (args, kwargs))

        with mock.patch.object(nn.Module, "__call__", call), ranges.heard_by(self._run_as_one):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A range around a phase as a whole."""
        self.sink.begin(Range(name))
        try:
            yield
        finally:
            self.sink.end()

    def _run_as_one(
        self, layers: Sequence[nn.Module], function: Callable[..., Tensor], x: Tensor, args: tuple[Any, ...]
    ) -> Tensor:
        result: Tensor = self._run(tuple(layers), lambda: function(x, *args), x)
        return result

    def _run(self, layers: tuple[nn.Module, ...], function: Callable[[], Any], inputs: Any) -> Any:
        if self._open and set(layers) <= set(
            self._open[-1]
        ):  # a layer that says again what its call has said
            return function()
        names = tuple(self._names.get(layer, type(layer).__name__) for layer in layers)
        inside = len(layers) == 1 and any(True for _ in layers[0].children())
        known = nodes_of(inputs)  # before the call, since one in place changes its input's node
        self._open.append(layers)
        self.sink.begin(Range(FORWARD, names, inside))
        try:
            result = function()
        finally:
            self.sink.end()
            self._open.pop()
        self._follow(nodes_of(result), known, Range(BACKWARD, names, inside))
        return result

    def _follow(self, found: Iterable[Any], known: Iterable[Any], what: Range) -> None:
        """Hooks on the nodes between an output and the inputs, as far as no layer inside has them already."""
        left, seen = list(found), set(known)
        while left:
            node = left.pop()
            if node in seen or hasattr(node, "variable"):  # the latter takes a gradient over
                continue
            seen.add(node)
            left += [before for before, _ in node.next_functions if before is not None]
            if _MARK not in node.metadata:
                node.metadata[_MARK] = True
                node.register_prehook(lambda _: self.sink.begin(what))
                node.register_hook(lambda *_: self.sink.end())


def nodes_of(values: Any) -> set[Any]:
    """The nodes of autograd's graph that made the tensors in some values."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
