"""What all Functions of the layers share: a quick `apply`, and the refusal of second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Function:
    """An autograd Function of `forward`, `keep` and `backward` that costs no more per call than the older style.

    `forward` returns the result, or a tuple of the result and of tensors (or None) that only `keep` looks at.
    `keep(ctx, inputs, output)` saves what backward needs of the inputs and the results.

    PyTorch binds the arguments of a Function with `setup_context` to the signature of its forward in every call
    (inspect.signature, about 70 us here), which for a small layer is longer than the layer itself. Outside of
    torch.func and torch.compile, which need the two apart, a twin in the older style calls the same two functions.
    """

    forward: Callable[..., Any]
    keep: Callable[..., None]
    backward: Callable[..., Any]
    _twin: type[torch.autograd.Function]
    _split: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.keep(ctx, args, output)
            return output[0] if isinstance(output, tuple) else output

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            cls.keep(ctx, inputs, output)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])

        def kind(**functions: Any) -> type[torch.autograd.Function]:
            parts = {name: staticmethod(function) for name, function in functions.items()}
            return type(cls.__name__, (torch.autograd.Function,), parts)

        cls._twin = kind(forward=forward, backward=cls.backward)
        # Neither is this class a Function itself: torch.compile would not call its `apply` then.
        cls._split = kind(forward=cls.forward, setup_context=setup_context, backward=cls.backward)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run forward and record backward; the first result."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            output = cls._split.apply(*args)
            return output[0] if isinstance(output, tuple) else output
        return cls._twin.apply(*args)


def refuse_second_order(name: str) -> None:
    """Raise if backward runs with create_graph=True.

    Raises:
        RuntimeError: a second derivative through the named layer was asked for.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} keeps too little to be differentiated twice; call backward without create_graph=True, "
            "or use the plain layer (sparse_bwd.restore) where second derivatives are needed."
        )
