"""Measures one case, in the process that has it for itself: correct first, then bytes, then times beside dense.

peak        highest allocation of the third step above what is alive before it (resident)
saved       bytes that autograd keeps from forward to backward; for compiled graphs and checkpoints, whose keeping
            no hook sees, what the allocator has given out and not got back when the forward is over (`held`)
ms          p20, p50, p80 of forward with loss, backward, optimizer with zero_grad, and their sum, step by step;
            on CPU interleaved with dense, on a GPU by events with the L2 cache flushed
ratio       p50 of the step over that of dense in the same rounds, in dense's faster layout
flops       operations of backward: 2 per weight and position for dw, and the same for dx where it is computed
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch

from sparse_bwd.measure.bench.asked import LAYOUTS, Asked, Case
from sparse_bwd.measure.bench.correct import check, gradients_of
from sparse_bwd.measure.bench.made import Made
from sparse_bwd.measure.bench.strategies import DENSE, STRATEGIES
from sparse_bwd.measure.energy import EnergyMeter
from sparse_bwd.measure.kernels import precision
from sparse_bwd.measure.meter import WARM, Meter, meter_for, quantiles
from sparse_bwd.measure.step import synchronise
from sparse_bwd.measure.training_step import TrainingStep
from sparse_bwd.memory import peak_bytes, saved_bytes
from sparse_bwd.memory.events import record
from sparse_bwd.memory.predict import predict
from sparse_bwd.memory.timeline import state_tensors, unique_bytes
from sparse_bwd.selection.flops import backward_flops
from sparse_bwd.selection.limits import example_loss

Row = dict[str, Any]
NO_DENSE = "none"  # in place of dense's layout where dense does not fit into memory
CHECKED_SHARE = 16  # of the batch, one part, is compared with dense where dense does not fit as a whole
ENERGY_SECONDS = 2.0  # of steps between two readings of a counter


def measure(asked: Asked, case: Case, dense_layout: str = "", sys: Path = Path("/sys")) -> Row:
    """The row of a case.

    Args:
        dense_layout: the faster one of dense; "" = find out, which the case "dense" does; NO_DENSE = there are no
            figures of dense to compare with, and gradients are compared on a part of the batch.
        sys: where counters of energy are.

    Raises:
        Wrong: the case computes something else than dense PyTorch.
    """
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    meter = meter_for(asked.device, asked.rounds)
    with precision(asked.dtype):
        if case.strategy == DENSE and not dense_layout:
            dense_layout = faster_layout(asked, meter)
        alone = dense_layout == NO_DENSE
        images = max(1, asked.batch // CHECKED_SHARE) if alone else None
        layout = dense_layout if case.strategy == DENSE else asked.layout or dense_layout
        right = gradients_of(_dense(asked, layout if alone else dense_layout).step, images)
        made = STRATEGIES[case.strategy].make(asked, case, layout)
        checked = check(made, right, images)
        del right
        row = bytes_of(made, meter) | {"layout": layout, "dense_layout": dense_layout, "checked": checked}
        row |= {**_work(made, asked), **made.selection, **made.extra}
        row |= times_of(made, None if alone else _dense(asked, dense_layout), meter)
        row["joules"] = _energy(asked, made.step, row["ms"]["step"][1], sys)
    row["images_per_s"] = float(f"{asked.batch / row['ms']['step'][1] * 1e3:.4g}")
    return row


def _dense(asked: Asked, layout: str) -> Made:
    return STRATEGIES[DENSE].make(asked, Case(DENSE), layout)


def faster_layout(asked: Asked, meter: Meter) -> str:
    """In which of PyTorch's layouts dense is faster here, both interleaved."""
    steps = {layout: {"step": _dense(asked, layout).step.step} for layout in LAYOUTS}
    found = meter.samples(steps, cold=False)
    return min(LAYOUTS, key=lambda layout: quantiles(found[layout]["step"])[1])


def bytes_of(made: Made, meter: Meter) -> Row:
    """Sizes in bytes, after the steps that allocate what stays."""
    step = made.step
    for _ in range(WARM):
        step.step()
    saved = None if made.hidden else saved_bytes(step.loss, step.variant.model)
    held = held_bytes(step, meter)
    meter.release()
    peak = peak_bytes(step.step, meter.device)
    step.run_forward()
    step.run_backward()
    gradients = [p.grad for p in step.variant.model.parameters() if p.grad is not None]
    row = {
        "saved": held if saved is None else saved,
        "held": held,
        "peak": peak.peak,
        "resident": peak.resident,
        "reserved": peak.reserved,
        "gradients": unique_bytes(gradients),
        "optimizer": unique_bytes(state_tensors(step.optimizer)),
        "trained": step.trained,
    }
    del gradients
    step.update()
    return row


def held_bytes(step: TrainingStep, meter: Meter) -> int:
    """What the allocator has given out during a forward and not got back at its end."""
    before = meter.memory()
    if before is None:
        held = sum(event.nbytes for event in record(step.run_forward, "cpu"))
    else:
        step.run_forward()
        after = meter.memory()
        assert after is not None
        held = after[0] - before[0]
    step.run_backward()
    step.update()
    return held


def times_of(made: Made, dense: Made | None, meter: Meter) -> Row:
    """The case's parts beside those of dense, in the same rounds."""
    steps = {"case": made.step, **({} if dense is None else {"dense": dense.step})}
    gc.collect()
    found = meter.samples({name: step.parts for name, step in steps.items()}, cold=False)
    ms = {name: _with_whole(parts) for name, parts in found.items()}
    if dense is None:
        return {"ms": ms["case"], "dense_ms": None, "ratio": None}
    ratio = ms["case"]["step"][1] / ms["dense"]["step"][1]
    return {"ms": ms["case"], "dense_ms": ms["dense"], "ratio": float(f"{ratio:.4g}")}


def _with_whole(parts: dict[str, list[float]]) -> dict[str, list[float]]:
    """Quantiles of the parts, and of their sum in each round."""
    whole = [sum(values) for values in zip(*parts.values(), strict=True)]
    return {name: quantiles(values) for name, values in [*parts.items(), ("step", whole)]}


def _work(made: Made, asked: Asked) -> Row:
    """Operations of backward, and by layer these and the bytes kept, as predicted in fp32.

    None where a compiler or recomputation decides what is computed; nothing by layer where it cannot be told.
    """
    if made.hidden:
        return {"flops": None, "parts": {}}
    model, x = made.step.variant.model, made.step.variant.x
    flops = backward_flops(model, None, x)
    parts = {}
    if asked.dtype in ("fp32", "tf32"):
        saved = predict(model, None, x, asked.optimizer, example_loss, by_layer=True).saved_by
        parts = {"saved": saved, "flops": flops}
    return {"flops": sum(flops.values()), "parts": parts}


def _energy(asked: Asked, step: TrainingStep, ms: float, sys: Path) -> float | None:
    """Joules of a step, over steps that take ENERGY_SECONDS."""
    meter = EnergyMeter(asked.device, sys)
    count = max(1, round(ENERGY_SECONDS * 1e3 / max(ms, 1e-3)))

    def work() -> None:
        for _ in range(count):
            step.step()
        synchronise(step.variant.x.device)
        time.sleep(0.01)  # counters lag by some ms

    joules = meter.joules(work)
    return None if joules is None else float(f"{joules / count:.4g}")
