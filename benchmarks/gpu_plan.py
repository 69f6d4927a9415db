"""What `benchmarks.gpu` measures, the most important first, and the compiling that is done ahead of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_operators import (
    Job,
    bandwidth,
    ceilings,
    family,
    layers_of,
    moving_calls,
    weight_gradient,
)
from benchmarks.gpu_steps import compiled, eager
from sparse_bwd.measure.meter import CudaMeter
from sparse_bwd.measure.networks import NETWORKS

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 8
MEMORY = 0.8  # of the device, for all workers together


@dataclass(frozen=True)
class Plan:
    """Jobs in their order, the test files that come first, and limits in seconds.

    `seconds` is for everything but, in a quick run, the tests; `tests_seconds` and `warm_seconds` are for their parts.
    """

    jobs: list[Job]
    quick: bool = False
    seconds: float = 480.0
    tests_seconds: float = 200.0
    warm_seconds: float = 90.0
    tests: list[Path] = field(default_factory=list)


def gradients(dtype: str, families: Iterable[str]) -> list[Job]:
    """Every distinct layer of the networks, family by family."""
    found = layers_of(NETWORKS)
    return [
        weight_gradient(layer, dtype, networks=names)
        for kind in families
        for layer, names in found.items()
        if family(layer) == kind
    ]


def full() -> list[Job]:
    """What the goals need comes first, in fp32; then the rest of fp32, TF32 and bf16."""
    families = ("depthwise", "1x1", "linear", "k x k")
    jobs = [ceilings(), *map(bandwidth, moving_calls("fp32"))]
    jobs += [eager("mobilenet_v2", "fp32"), eager("resnet50", "fp32")]
    jobs += [compiled("mobilenet_v2", "fp32", layout) for layout in ("channels_last", "nchw")]
    jobs += gradients("fp32", families)
    jobs += [eager("mobilenet_v2", "bf16"), eager("resnet50", "bf16"), eager("resnet18", "fp32")]
    jobs += gradients("bf16", families)
    jobs += [*map(bandwidth, moving_calls("bf16"))]
    jobs += gradients("tf32", families)
    jobs += [eager("mobilenet_v2", "tf32"), eager("resnet50", "tf32")]
    jobs += [compiled("resnet50", "fp32", "channels_last"), compiled("mobilenet_v2", "bf16", "channels_last")]
    jobs += [eager("resnet18", dtype) for dtype in ("bf16", "tf32")]
    return jobs


def quick() -> list[Job]:
    """Every kind of row once: the largest tensors of each operator, one layer of each family, one network."""
    moving = {call.operator: call for call in reversed(moving_calls("fp32"))}
    jobs = [ceilings(), *map(bandwidth, moving.values())]
    first = {kind: gradients("fp32", [kind])[1] for kind in ("depthwise", "1x1", "linear", "k x k")}
    jobs += [*first.values(), gradients("bf16", ["1x1"])[1], gradients("tf32", ["1x1"])[1]]
    return [*jobs, eager("mobilenet_v2", "fp32"), compiled("mobilenet_v2", "fp32", "channels_last")]


def make(is_quick: bool) -> Plan:
    """The plan of the command."""
    tests = sorted(
        path for folder in ("gpu", "triton") for path in (ROOT / "tests" / folder).glob("test_*.py")
    )
    if is_quick:
        return Plan(quick(), True, 120.0, warm_seconds=45.0, tests=tests)
    return Plan(full(), tests=tests)


def warm(plan: Plan) -> None:
    """Run each job that compiles once without timing it, several at a time, so that caches on disk hold its kernels.

    Kernels of Triton and graphs of torch.compile take seconds to minutes, one after the other in the measured part.
    """
    count = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=warm_part, args=(plan.quick, part, count)) for part in range(count)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + plan.warm_seconds
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        if worker.is_alive():
            worker.terminate()
            worker.join()


def warm_part(is_quick: bool, part: int, count: int) -> None:
    """One worker's share of the jobs that compile; what fails here fails again, with a word, when it is measured."""
    import torch

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    torch.cuda.set_per_process_memory_fraction(MEMORY / count)
    jobs = [job for job in (quick() if is_quick else full()) if job.warm]
    meter = CudaMeter(rounds=0)
    for job in sorted(jobs, key=lambda job: -job.seconds)[part::count]:  # the slowest first
        with contextlib.suppress(Exception):
            job.run(meter)
