"""What all Functions of the layers share: a quick `apply`, and the refusal of second derivatives."""

from __future__ import annotations

from typing import Any

import torch


class Function(torch.autograd.Function):
    """An autograd Function with `forward` and `setup_context` that costs no more per call than the older style.

    PyTorch binds the arguments of a Function with `setup_context` to the signature of its forward in every call
    (inspect.signature, about 70 us here), which for a small layer is longer than the layer itself. Outside of
    torch.func and torch.compile, which need the two apart, a twin in the older style calls the same two functions.
    """

    _twin: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()

        def forward(ctx: Any, *args: Any) -> Any:
            output = cls.forward(*args)
            cls.setup_context(ctx, args, output)
            return output

        cls._twin = type(
            cls.__name__,
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(cls.backward)},
        )

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run forward and record backward."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
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
