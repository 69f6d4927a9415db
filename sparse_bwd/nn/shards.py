"""Compact Parameters of a network whose tensors are sharded over processes, by rows, as DTensors (FSDP2 makes such).

The compact Parameter of a sharded tensor is a DTensor of its own, on the same mesh and with the same placements. To
make the two agree each process needs the compact slices that fall into its rows: the compact Parameter is gathered,
never the full tensor. A selection, which needs slices of the full tensor, gathers it, one layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_bwd.ops.write_back import read_slices, write_back_plain


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; asked without importing torch.distributed."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(values: Tensor, sharded: Any) -> Tensor:
    """`values`, equal on all processes, as a DTensor on the mesh of `sharded`; without traffic."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, sharded.device_mesh, sharded.placements, src_data_rank=None)


def compact_shards(layer: Any, full: Any, slot: Any) -> nn.Parameter:
    """A new compact Parameter of a sharded tensor; gathers the tensor once."""
    if not layer._sharded:
        raise ValueError(
            f"This {type(layer).__name__} was sharded by fully_shard(); call sparse_bwd.distributed.shard(model) "
            "in its place, so that selections can follow."
        )
    return nn.Parameter(placed_like(_slices(full, slot), full))


def refresh_shards(full: Any, part: Any, slot: Any) -> None:
    """Take the compact values from a sharded tensor, in place; gathers the tensor once."""
    local(part).copy_(local(placed_like(_slices(full, slot).to(part.dtype), part)))


def write_shards(full: Any, values: Tensor, slot: Any) -> None:
    """Write gathered compact values into this process's rows of a sharded tensor, unseen by its version counter."""
    target = local(full).data
    if not target.numel():
        return
    first, rows = _rows(full)
    if slot.index is None and slot.dim == 0:
        target.copy_(values[first : first + rows])
    elif slot.dim == 1 and slot.groups == 1:
        index = torch.arange(full.shape[1], device=target.device) if slot.index is None else slot.index
        target.index_copy_(1, index, values[first : first + rows])
    elif slot.dim == 0:
        here = (slot.index >= first) & (slot.index < first + rows)
        target.index_copy_(0, slot.index[here] - first, values[here])
    else:  # columns of groups cut across the rows of their group: written into a whole tensor of this layer
        whole, mask = target.new_zeros(full.shape), target.new_zeros(full.shape)
        write_back_plain(
            [whole, mask], [values, torch.ones_like(values)], [slot.index] * 2, [1, 1], [slot.groups] * 2
        )
        mine = slice(first, first + rows)
        torch.where(mask[mine] != 0, whole[mine], target, out=target)


def synchronise_shards(layer: Any, name: str, full: Tensor, part: Tensor, slot: Any) -> None:
    """Bring the shards of a full tensor up to date; all processes call this together."""
    if not is_sharded(full):
        raise RuntimeError(
            f"A {type(layer).__name__} of a sharded model was called by itself; call the model that shard() was given."
        )
    if not is_sharded(part):  # in the model's forward, which began with bringing the shards up to date
        return
    with torch.no_grad():
        write_shards(full, gathered(part), slot)
    layer._record([name])


def shards_agree(layer: Any, name: str) -> bool:
    """Whether a sharded tensor is known to have the values of its compact one.

    Reading it then writes nothing: torch.distributed.checkpoint loads shards in place and reads them before it calls
    `load_state_dict`. The version counter of a DTensor, unlike that of its local part, is the same on all processes.
    """
    last = layer._synced.get(name)
    part = layer._parameters.get(f"trainable_{name}")
    known: bool = layer._sharded and last is not None and last.part is part
    return known and last.part_version == part._version


def _slices(full: Any, slot: Any) -> Tensor:
    with torch.no_grad():
        return read_slices(gathered(full).detach(), slot.index, slot.dim, slot.groups)


def _rows(full: Any) -> tuple[int, int]:
    """The first row that this process holds, and how many."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(full.shape, full.device_mesh, full.placements)
    return int(offset[0]), int(shape[0])


def check_rows(full: Any, what: str) -> None:
    """ValueError unless a sharded tensor is sharded by rows."""
    if any(place.is_shard() and place.dim != 0 for place in full.placements):
        raise ValueError(f"{what} is sharded on dimension {full.placements}; shard it by rows (dimension 0).")
