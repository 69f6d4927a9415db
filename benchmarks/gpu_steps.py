"""Jobs of `benchmarks.gpu`: whole training steps of the convolutional networks, dense and ours.

A step is forward, loss, backward, an SGD step with momentum and `zero_grad(set_to_none=True)`, on one fixed random
batch; norms frozen, 10 % of the channels of every convolution and the whole classifier trained. Dense trains all
weights but the norms'. The learning rate is 0, so that every step does the same work on the same values.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import stock
from benchmarks.gpu_operators import Job, Row
from sparse_bwd.measure.kernels import precision
from sparse_bwd.measure.meter import WARM, Meter
from sparse_bwd.measure.step import LAYOUTS, Setting, Variant, dense, ours
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.memory import peak_bytes, saved_bytes

FRACTION = 0.1


def checkpointed(variant: Variant) -> Callable[[Tensor], Tensor]:
    """The model with its blocks recomputed in backward."""
    for block in stock.blocks(variant.model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return variant.model


def eager(
    network: str, dtype: str, batch: int = 128, size: int = 224, layouts: Iterable[str] = tuple(LAYOUTS)
) -> Job:
    """Dense, ours and dense with checkpoints, in both layouts."""
    makers: dict[str, dict[str, Callable[[Setting, str], TrainingStep]]] = {
        layout: {"dense": _dense(dtype), "ours": _ours(dtype), "dense, checkpoints": _checkpointed(dtype)}
        for layout in layouts
    }
    return Job(
        f"steps of {network}, {dtype}", 20, partial(_run, network, dtype, batch, size, makers), warm=False
    )


def compiled(
    network: str, dtype: str, layout: str, batch: int = 128, size: int = 224, compiler: str = "inductor"
) -> Job:
    """Dense and ours under torch.compile, in one layout."""
    makers = {layout: {"dense, compiled": _dense(dtype, compiler), "ours, compiled": _ours(dtype, compiler)}}
    run = partial(_run, network, dtype, batch, size, makers)
    return Job(f"compiled steps of {network}, {dtype}, {layout}", 45, run)


def _dense(dtype: str, compiler: str | None = None) -> Callable[[Setting, str], TrainingStep]:
    return lambda setting, layout: _training(dense(setting, layout), dtype, compiler)


def _ours(dtype: str, compiler: str | None = None) -> Callable[[Setting, str], TrainingStep]:
    return lambda setting, layout: _training(ours(setting, layout, FRACTION), dtype, compiler)


def _checkpointed(dtype: str) -> Callable[[Setting, str], TrainingStep]:
    def make(setting: Setting, layout: str) -> TrainingStep:
        variant = dense(setting, layout)
        return TrainingStep(variant, checkpointed(variant), dtype)

    return make


def _training(variant: Variant, dtype: str, compiler: str | None) -> TrainingStep:
    forward: Callable[[Tensor], Tensor] = variant.model
    if compiler is not None:
        forward = torch.compile(variant.model, backend=compiler)
    return TrainingStep(variant, forward, dtype)


def _run(
    network: str,
    dtype: str,
    batch: int,
    size: int,
    makers: dict[str, dict[str, Callable[[Setting, str], TrainingStep]]],
    meter: Meter,
) -> Row:
    """The row of a case: bytes one by one, then times in interleaved rounds."""
    setting = Setting(stock.NETWORKS[network], batch, size, device=meter.device)
    found: dict[str, dict[str, Row]] = {}
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    with precision(dtype):
        for layout, kinds in makers.items():
            for name, make in kinds.items():
                training = make(setting, layout)
                found.setdefault(layout, {})[name] = _bytes(training, meter, name)
                steps[layout, name] = training.step
        for (layout, name), spread in meter.times(steps, cold=False).items():
            found[layout][name]["ms"] = spread
    del steps, training
    torch.compiler.reset()
    while (
        gc.collect()
    ):  # the nodes of a compiled step hold one another, and each collection frees the outermost
        pass
    meter.release()
    about = {"network": network, "dtype": dtype, "batch": batch, "size": size}
    return {"kind": "step", **about, "variants": found}


def _bytes(training: TrainingStep, meter: Meter, name: str) -> Row:
    """Bytes of a step after a warm-up: those kept for backward, by the hooks of autograd and by the allocator (what a
    compiled graph and checkpoints keep only the latter sees), and the peak above what was alive before.

    Raises:
        AssertionError: more or less is trained than the variant says, or the loss is not finite.
    """
    assert training.trained == training.variant.expected_trained, f"{name} trains {training.trained} weights"
    for _ in range(WARM):
        training.step()
    row: Row = {"trained": training.trained, "saved": None, "held": None, "reserved": None}
    if "," not in name:
        row["saved"] = saved_bytes(training.loss, training.variant.model)
    before = meter.memory()
    loss = training.loss()
    assert bool(loss.isfinite()), f"{name}: the loss is {float(loss)}"
    after = meter.memory()
    del loss
    meter.release()
    start = meter.memory()
    peak = peak_bytes(training.step, meter.device)
    row |= {"peak": peak.peak, "resident": peak.resident}
    if before and after and start and peak.reserved is not None:
        row |= {"held": after[0] - before[0], "reserved": peak.reserved - start[1]}
    return row


def variants(row: Row) -> Iterable[tuple[str, str, Any]]:
    """Layout, name and measurement of every variant of a row."""
    return (
        (layout, name, found) for layout, kinds in row["variants"].items() for name, found in kinds.items()
    )
