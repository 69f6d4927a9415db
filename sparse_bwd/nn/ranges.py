"""Where layers that run as one say so: a profile may watch without hooks, which would make them run one by one.

Nobody listens as a rule, and then the layers are called and nothing else happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# Called with the layers, the function that runs them, its input and its other arguments; returns what that returns.
Listener = Callable[[Sequence[nn.Module], Callable[..., Tensor], Tensor, tuple[Any, ...]], Tensor]

listener: Listener | None = None


@contextmanager
def heard_by(new: Listener) -> Iterator[None]:
    """Inside, `new` calls layers that run as one, on any thread."""
    global listener
    before, listener = listener, new
    try:
        yield
    finally:
        listener = before


def run_as_one(layers: Sequence[nn.Module], function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """function(x, *args), which runs all these layers."""
    return function(x, *args) if listener is None else listener(layers, function, x, args)
