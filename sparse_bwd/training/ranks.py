"""One run on several processes, as `torchrun` starts them.

Rank r of R trains on images r, r + R, ... of each batch and tests on every R-th test image; losses are weighted so that
the mean of the ranks' gradients is the gradient of the whole batch. Rank 0 alone writes files and shows progress.
Traffic of a step: the compact gradients, and two numbers of 8 bytes by which all ranks stop at the same step.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparse_bwd.training.config import Runtime
from sparse_bwd.training.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; by default the only one."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"  # where numbers that travel live

    @property
    def first(self) -> bool:
        return self.rank == 0

    def highest(self, code: int) -> int:
        """The largest of all ranks' numbers."""
        if self.world == 1:
            return code
        shared = torch.tensor([code], device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        if self.world == 1:
            return list(numbers)
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared)
        return [float(value) for value in shared]

    def gathered(self, value: Mapping[str, Any]) -> list[Any]:
        """The values of all ranks, on rank 0; there alone they are complete."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.gather_object(value, values if self.first else None)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        self.highest(0)

    def take_buffers(self, model: nn.Module) -> None:
        """Give all ranks rank 0's statistics of norms, which the checkpoint will hold."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This rank's part of what all ranks do together."""
        return list(items[self.rank :: self.world])

    def wrap(self, model: nn.Module, buffers: bool) -> nn.Module:
        """The model as the training step calls it; `buffers`: those of rank 0 hold for all in each forward."""
        if self.world == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        from sparse_bwd.distributed import follow

        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        ddp.broadcast_buffers = buffers
        return follow(ddp)


def is_first() -> bool:
    """Whether this process may show a result: the only one, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined(runtime: Runtime) -> Iterator[tuple[Ranks, Runtime]]:
    """The processes of the run and this one's part of the runtime; alone unless torchrun has started several."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or not dist.is_available():
        yield Ranks(), runtime
        return
    if dist.is_initialized():
        raise UserError(
            "A run joins its processes itself: call it before torch.distributed.init_process_group()."
        )
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = runtime.device.startswith("cuda")
    device = f"cuda:{local}" if on_gpu else "cpu"
    if on_gpu and torch.cuda.is_available():  # pragma: no cover -- needs CUDA
        torch.cuda.set_device(device)
        runtime = replace(runtime, device=device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Ranks(rank, world, device), runtime if rank == 0 else replace(runtime, quiet=True)
    finally:
        dist.destroy_process_group()


def _is_of_a_backend(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or re.search(r"gloo|NCCL|Connection", str(error)) is not None


@contextlib.contextmanager
def lost_ranks_are_told(ranks: Ranks, out: Any) -> Iterator[None]:
    """A sentence in place of the backend's error when another process of the run has ended."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not _is_of_a_backend(error):
            raise
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise UserError(
            f"Rank {ranks.rank} of {ranks.world} has lost the others: a process of this run has ended ({reason}). "
            f"Start torchrun again, with any number of processes, with --resume --out {out}: the run goes on from its "
            "last checkpoint."
        ) from error
