"""One decision on all processes: statistics are averaged over the ranks, and rank 0's selection holds for all.

With torch.distributed initialised every rank calls `policy.step()`. Where each measures on images of its own, the mean
is that over all of them (of equal numbers of images; where a Linear sees one row per image, whose similarity runs over
the batch, a mean of that of the parts); where all measure on the same ones, it changes nothing.
Traffic of a selection: 8 bytes per measured channel, and the selection itself as JSON.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_bwd.selection.selection import Selection


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a CPU tensor over all ranks; `values` itself on one process."""
    if not several():
        return values
    total = values.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.cpu() / dist.get_world_size()


def of_first_rank(selection: Selection) -> Selection:
    """The selection that rank 0 has made."""
    if not several():
        return selection
    device = _device()
    text = torch.tensor(list(json.dumps(selection.to_dict()).encode()), dtype=torch.uint8)
    size = torch.tensor([len(text)], device=device)
    dist.broadcast(size, src=0)
    shared = (
        text.to(device) if dist.get_rank() == 0 else torch.zeros(int(size), dtype=torch.uint8, device=device)
    )
    dist.broadcast(shared, src=0)
    return Selection.from_dict(json.loads(bytes(shared.cpu().tolist())))


def _device() -> torch.device:
    """Where the backend's tensors live."""
    if dist.get_backend() == "nccl":  # pragma: no cover -- needs CUDA
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
