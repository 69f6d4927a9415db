"""Shapes of real models: every call of a leaf module in one forward, with what flows in and out.

The forward runs on fake tensors: nothing is computed, nothing is stored, and the model stays as it is.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of a leaf module.

    x_shape, y_shape: of the first input and of the output; x_storage, y_storage: numbers that are equal where two
    tensors share memory; x_needs, y_needs: whether a gradient flows through them; itemsize in bytes.
    """

    name: str
    module: nn.Module
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    x_storage: int
    y_storage: int
    x_needs: bool
    y_needs: bool
    itemsize: int

    @property
    def x_elements(self) -> int:
        return _product(self.x_shape)

    @property
    def y_elements(self) -> int:
        return _product(self.y_shape)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def trace(
    model: nn.Module, example: Tensor, prepare: Callable[[nn.Module], object] | None = None
) -> list[Call]:
    """Calls of all leaf modules of a plain PyTorch model in a forward of `example`, in order.

    `prepare` may change the copy on which the forward runs, for example its `requires_grad` flags.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    if prepare is not None:
        prepare(fake)

    def forward() -> None:
        with mode, torch.enable_grad():
            fake(mode.from_tensor(example))

    return calls_in(fake, forward)


def calls_in(model: nn.Module, forward: Callable[[], object]) -> list[Call]:
    """Calls of all leaf modules of a model while `forward` runs it; the hooks make chains run layer by layer."""
    calls: list[Call] = []
    alive: list[Tensor] = []  # a number names a storage only as long as the storage lives

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(y, Tensor):
                alive.extend((args[0], y))
                calls.append(_call(name, module, args[0], y))

        return record

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _call(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Call:
    return Call(
        name=name,
        module=module,
        x_shape=tuple(x.shape),
        y_shape=tuple(y.shape),
        x_storage=int(x.untyped_storage()._cdata),
        y_storage=int(y.untyped_storage()._cdata),
        x_needs=x.requires_grad,
        y_needs=y.requires_grad,
        itemsize=x.element_size(),
    )
