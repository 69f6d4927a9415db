"""What torch.compile reads of a layer, so that one graph serves every selection of the same layers.

A graph takes the shape of a Parameter, and so k, as a constant: it would be compiled again for every other k, until
dynamo's limit (8) is reached. A plain tensor may have a dimension of unknown size (`mark_unbacked`), 1 included. So a
graph is given a view of the compact Parameter made outside of it, through which gradients reach the Parameter, and the
index vectors, all marked. What a graph keeps for backward is fixed: another set of trained layers is another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What k counts as where a graph weighs what to keep. By itself it takes k for 4096, and would keep all of x rather
# than the chosen channels.
_HINT = 1


def of_any_length(tensor: Tensor | None, dim: int = 0) -> None:
    """Let graphs take a dimension of the tensor as unknown; None and what has a length of 0 enters none."""
    if tensor is not None and tensor.shape[dim] and tensor.device.type != "meta":
        # Here, for dynamo takes a second to import. Optimizers import it too.
        from torch._dynamo.decorators import mark_unbacked

        mark_unbacked(tensor, dim, hint_override=_HINT)


class _Alias(torch.autograd.Function):
    """A tensor in the memory of a Parameter that is no view for autograd: of a view dynamo also compares the base."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, strides: tuple[int, ...]) -> Tensor:
        alias: Tensor = part.new_empty(0)
        return alias.set_(part.untyped_storage(), part.storage_offset(), part.shape, strides)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@torch.enable_grad()
def graph_view(part: nn.Parameter, dim: int | None, channels_last: bool) -> Tensor:
    """The values of a compact Parameter as graphs are given them: in its memory, with gradients going to it.

    Args:
        dim: of its channels; None: their number stays one that the graph knows.
        channels_last: whether the full tensor is. The strides are then those of that layout for k = 1 as well, where
            tensors of one memory may have several and a graph compares them.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    strides = torch.empty(part.shape, device="meta", memory_format=layout).stride()
    view: Tensor = _Alias.apply(part, strides if part.is_contiguous(memory_format=layout) else part.stride())
    if dim is not None:
        of_any_length(view, dim)
    return view


def same_length(view: Tensor, dim: int, index: Tensor) -> None:
    """Tell a graph that a compact tensor has as many channels as its index."""
    torch._check(view.shape[dim] == index.shape[0])
