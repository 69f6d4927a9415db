"""Peak bytes: the highest allocation of a run above what was alive just before it.

CPU: running sum of the allocator events of the profiler (`events.py`). CUDA: the allocator's statistics.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_bwd.nn.compact import CompactLayer

from .events import record
from .saved import storage_key
from .simulate import index_tensors
from .timeline import state_tensors, unique_bytes


@dataclass(frozen=True)
class Peak:
    """Bytes of one run: `peak` above what was alive before it, `resident` alive before it.

    `reserved` is what the CUDA allocator had taken from the driver at most; None on CPU.
    """

    peak: int
    resident: int
    reserved: int | None = None

    @property
    def total(self) -> int:
        """Highest allocation, what was alive before included."""
        return self.peak + self.resident


def peak_bytes(fn: Callable[[], object], device: str | torch.device | None = None) -> Peak:
    """Run `fn` once and return its peak.

    `device` is the kind of memory that is watched; None means CUDA when this process has CUDA tensors, else the CPU.
    On CPU a block that is allocated before `fn` and freed by it counts as alive to the end, so start `fn` with
    gradients cleared. Call `fn` once or twice before: first steps also allocate what is kept ever after.
    """
    if not callable(fn):
        raise TypeError(
            f"Expected a function that runs a step, got {type(fn).__name__}: pass lambda: step()."
        )
    if device is None:
        kind = "cuda" if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0 else "cpu"
    else:
        kind = torch.device(device).type
    meters = {"cpu": _cpu_peak, "cuda": _cuda_peak}
    if kind not in meters:
        raise ValueError(f"Peak bytes can be measured on cpu and cuda, not on {kind}.")
    return meters[kind](fn, device)


def _cpu_peak(fn: Callable[[], object], device: str | torch.device | None) -> Peak:
    resident = resident_bytes()
    allocated = highest = 0
    for event in record(fn, "cpu"):
        allocated += event.nbytes
        highest = max(highest, allocated)
    return Peak(highest, resident)


def _cuda_peak(
    fn: Callable[[], object], device: str | torch.device | None
) -> Peak:  # pragma: no cover -- needs CUDA
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    return Peak(
        torch.cuda.max_memory_allocated(device) - resident, resident, torch.cuda.max_memory_reserved(device)
    )


def resident_bytes() -> int:
    """Bytes of all CPU tensors that Python can reach, and of their gradients, by unique storage."""
    gc.collect()
    seen: dict[int, int] = {}
    for tensor in _live_tensors():
        size = tensor.untyped_storage().nbytes()
        # What torch.compile traced with lives on, without data; sizes that it took as unknown are no numbers.
        if not isinstance(size, torch.SymInt):
            seen[storage_key(tensor)] = size
    return sum(seen.values())


def _live_tensors() -> Iterable[Tensor]:
    for item in gc.get_objects():
        # type(), because isinstance() would ask lazy module proxies for their class and so import them
        if type(item) is not Tensor and type(item) is not nn.Parameter:
            continue
        if item.device.type != "cpu" or item.layout is not torch.strided:
            continue
        yield item
        if item.is_leaf and item.grad is not None and item.grad.layout is torch.strided:
            yield item.grad


def held_between_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that training holds between steps beside the network: compact parameters, indices, optimizer state."""
    copied = sum(module.copied_bytes for module in model.modules() if isinstance(module, CompactLayer))
    return copied + unique_bytes(index_tensors(model)) + unique_bytes(state_tensors(optimizer))


def step_peak(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    warmup: int = 2,
) -> Peak:
    """Peak of a whole training step: forward, loss, backward, optimizer step, `zero_grad(set_to_none=True)`.

    Runs `warmup` steps first (two: the measured step is the third after a selection), so the model is trained by
    `warmup + 1` steps on the batch.
    """
    inputs, targets = batch

    def step() -> None:
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(warmup):
        step()
    return peak_bytes(step, inputs.device)
