"""What operators allocate and give back inside themselves: the part of a peak that a run on fake tensors cannot see.

Nothing but the operator knows it (oneDNN puts weights and images into its own order, a product gathers, a block of
layers has values of its own), and it changes with layout, shape, threads and version. So every distinct call, which is
one of an operator, its shapes, strides and dtypes, runs once in this process on zeros, and its allocations are read.
Other devices than the CPU are not measured: their scratch counts as 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from .events import record
from .saved import storage_key

# What is worth a run: all that computes with matrices. The others allocate their results and no more.
_PRODUCTS = {
    "aten": (
        "convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "linear", "native_layer_norm_backward",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "sparse_bwd": ("conv2d_dw", "linear_dw"),
    "sparse_bwd_native": ("conv_chain", "conv_chain_dx"),
}  # fmt: skip
# A number among the operands becomes a tensor of eight bytes, and then one of the other operands' type.
_NUMBER = 16
_measured: dict[Any, "_Call"] = {}


@dataclass(frozen=True)
class _Call:
    """Bytes of a call that was run here: beside its results, and all, with operands and results."""

    scratch: int
    whole: int


def scratch_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that one call of `func` takes beside its results and gives back before it returns; CPU only.

    Args:
        func: an operator of the dispatcher.
        args, kwargs: its arguments; of fake tensors only shapes, strides and dtypes matter.
    """
    space, _, name = func._schema.name.partition("::")
    if name not in _PRODUCTS.get(space, ()):
        return _NUMBER if _takes_number(func, args) else 0
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return 0
    key = (func, torch.get_num_threads(), repr(tree_map_only(Tensor, _description, (args, kwargs))))
    if key not in _measured:
        with _disable_current_modes(), torch.no_grad():
            _measured[key] = _measure(func, *tree_map_only(Tensor, _zeros, (args, kwargs)))
    return _measured[key].scratch


def largest_measured() -> int:
    """Bytes of the largest call that was run here to be measured, with operands and results; 0 before any."""
    return max((call.whole for call in _measured.values()), default=0)


def _takes_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a Python number stands among the arguments where an operator wants a number or a tensor."""
    kinds = (argument.type.kind() for argument in func._schema.arguments)
    return any(
        kind in ("NumberType", "TensorType") and isinstance(value, (int, float))
        for kind, value in zip(kinds, args, strict=False)
    )


def _description(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _zeros(tensor: Tensor) -> Tensor:
    """A real tensor like a fake one; real ones (indices) as they are."""
    if type(tensor) is Tensor:
        return tensor
    shape, stride = tuple(int(size) for size in tensor.shape), tuple(int(step) for step in tensor.stride())
    return torch.empty_strided(shape, stride, dtype=tensor.dtype).zero_()


def _measure(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    given = {storage_key(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    func(*args, **kwargs)  # first calls also build what is kept for all later ones
    results: list[Any] = []
    allocated = highest = 0
    for event in record(lambda: results.append(func(*args, **kwargs)), "cpu"):
        allocated += event.nbytes
        highest = max(highest, allocated)
    made = {
        storage_key(leaf): leaf.untyped_storage().nbytes()
        for leaf in tree_leaves(results)
        if isinstance(leaf, Tensor)
    }
    scratch = max(highest - sum(size for key, size in made.items() if key not in given), 0)
    operands = sum(leaf.untyped_storage().nbytes() for leaf in given.values())
    return _Call(scratch, operands + max(highest, 0))
