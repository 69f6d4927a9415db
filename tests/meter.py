"""A counter of saved bytes for the tests, written apart from `sparse_bwd.memory` so that each checks the other."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def saved_by_kind(run: Callable[[], T], constants: Iterable[Tensor] = ()) -> tuple[T, int, int]:
    """Run a forward and count the bytes autograd keeps for its backward: (result, activations, int64 vectors).

    Every storage counts once and in full, however many views of it are saved; Parameters, and the storages of
    `constants` (a model's buffers), count nothing. The result keeps the graph alive.
    """
    storages: dict[int, tuple[torch.UntypedStorage, bool]] = {}
    free = {tensor.untyped_storage()._cdata for tensor in constants}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if isinstance(tensor, torch.nn.Parameter):
            free.add(storage._cdata)
        storages[storage._cdata] = storage, tensor.dtype is torch.int64 and tensor.dim() == 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    kept = [entry for key, entry in storages.items() if key not in free]
    indices = sum(storage.nbytes() for storage, is_index in kept if is_index)
    return result, sum(storage.nbytes() for storage, _ in kept) - indices, indices


def saved_bytes(run: Callable[[], T], constants: Iterable[Tensor] = ()) -> tuple[T, int]:
    """The result of a forward and all the bytes kept for its backward, counted as `saved_by_kind` does."""
    result, activations, indices = saved_by_kind(run, constants)
    return result, activations + indices
