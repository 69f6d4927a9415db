"""The command line of Nsight Compute for the kernels of one operator, in a step that is asked for in words.

The step runs on fake tensors and its operators are written down; what each call would launch comes from the launchers
of `ops/triton` themselves. So the names of the kernels and the number of launches before the measured step are those
of this configuration, and no GPU is needed. Where Triton is not installed, the names are those of the native library.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sparse_bwd.measure.kernels import precision
from sparse_bwd.measure.training_step import DTYPES, TrainingStep
from sparse_bwd.memory.simulate import fake_copy
from sparse_bwd.ops import backend, tuning
from sparse_bwd.training.errors import UserError, unknown

WARM = 2  # steps before the measured one
NATIVE_KERNEL = "{}(_planes|_pixels)?_kernel"  # in csrc/cuda/kernels

Launches = list[tuple[str, str]]  # operator and kernel, in order


@dataclass(frozen=True)
class Command:
    """`line` profiles `launches` launches of `kernels`, those of one step, after `skipped` ones of the warm-up.

    shared: other operators of the step that launch the same kernels; they are profiled with them.
    """

    line: str
    operator: str
    kernels: tuple[str, ...]
    skipped: int
    launches: int
    shared: tuple[str, ...]

    def as_text(self) -> str:
        """For a terminal; the last line is the command."""
        about = f"{', '.join(self.kernels)}: {self.launches} per step, after {self.skipped} of the warm-up"
        if self.shared:
            about += f"; {', '.join(self.shared)} launch the same kernels"
        return f"{about}:\n{self.line}"


def with_kernels() -> list[str]:
    """The operators that have CUDA or Triton kernels of ours."""
    return sorted({*backend.in_triton(), *backend.in_cuda()})


def check_operator(operator: str) -> None:
    """UserError for an operator that has no kernel."""
    if operator not in with_kernels():
        raise unknown("operator with a kernel", operator, with_kernels())


def command(operator: str, step: TrainingStep, words: Sequence[str], out: Path) -> Command:
    """The command line for an operator of a step that `words` ask for. UserError if no kernel of it runs."""
    steps = [[launch for each in calls for launch in launched(*each, step.dtype)] for calls in calls_of(step)]
    kernels = tuple(dict.fromkeys(kernel for name, kernel in steps[-1] if name == operator))
    if not kernels:
        running = sorted({name for name, _ in steps[-1]})
        raise UserError(
            f"No kernel of {operator} runs in a step of this configuration; kernels run of "
            f"{', '.join(running) or 'no operator'}."
        )
    return of_kernels(operator, kernels, steps, words, out)


def of_kernels(
    operator: str, kernels: tuple[str, ...], steps: Sequence[Launches], words: Sequence[str], out: Path
) -> Command:
    """The command line for some kernels; `steps`: what the first step launches, and every later one."""
    matched = [sum(kernel in kernels for _, kernel in each) for each in steps]
    skipped = matched[0] + (WARM - 1) * matched[-1]
    shared = sorted({name for name, kernel in steps[-1] if kernel in kernels} - {operator})
    ncu = [
        "ncu", "--set", "full", "--target-processes", "all", "--kernel-name", f"regex:^({'|'.join(kernels)})$",
        "--launch-skip", str(skipped), "--launch-count", str(matched[-1]), "--force-overwrite",
        "--export", str(out / f"{operator}.ncu-rep"),
    ]  # fmt: skip
    profile = ["python", "-m", "sparse_bwd", "profile", *words, "--out", str(out), "--step-only"]
    return Command(shlex.join([*ncu, *profile]), operator, kernels, skipped, matched[-1], tuple(shared))


class _Operators(TorchDispatchMode):
    """Writes down the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == backend.NAMESPACE:
            self.calls.append((func._overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


def calls_of(step: TrainingStep) -> list[list[tuple[str, tuple[Any, ...]]]]:
    """Operators and arguments in forward and backward of the first step and of the second, on tensors without data."""
    x, y, low = step.variant.x, step.variant.y, DTYPES[step.dtype]
    fake, mode = fake_copy(step.variant.model)
    found = []
    for _ in range(2):
        with mode, _Operators() as seen, torch.enable_grad():
            with torch.autocast(x.device.type, low, enabled=low is not None):
                loss = F.cross_entropy(fake(mode.from_tensor(x)), mode.from_tensor(y))
            loss.backward()
            fake.zero_grad(set_to_none=True)
        found.append([(name, tree_map_only(Tensor, _on_meta, args)) for name, args in seen.calls])
    return found


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def launched(operator: str, args: tuple[Any, ...], dtype: str) -> Launches:
    """The kernels of ours that a call launches on this machine's GPU, or on one that the table has no entry for."""
    gpu = torch.cuda.is_available()
    architecture = backend.architecture(torch.device("cuda")) if gpu else tuning.DEFAULT
    order = tuning.order(operator, architecture) if operator in backend.in_triton() else ("native",)
    if importlib.util.find_spec("triton") is None:
        native = "native" in order and operator in backend.in_cuda()
        return [(operator, NATIVE_KERNEL.format(operator.rstrip("_")))] if native else []
    if "triton" not in order:
        return []
    from sparse_bwd.measure.tiles import in_triton
    from sparse_bwd.ops.triton.launch import recorded

    with precision(dtype), recorded(architecture, must=False) as launches:
        served = in_triton(operator)(*args) is not NotImplemented
    return [(operator, launch.kernel.__name__) for launch in launches] if served else []
