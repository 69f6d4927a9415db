"""Every operator beside what plain PyTorch does for the same: batch 16, fp32, a group per operator and layer."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.suites.interleaved import Timer
from benchmarks.suites.operators import Case, cases
from sparse_bwd.measure.kernels import LAYOUTS, Setting, precision

BATCH, TINY_BATCH, ROUNDS = 16, 2, 40


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_operator(case: Case, timer: Timer) -> None:
    """The operator in channels_last; its least bytes over its time are its bandwidth."""
    settings = {layout: Setting(TINY_BATCH if timer.tiny else BATCH, "fp32", layout) for layout in LAYOUTS}
    call = case.call(settings["channels_last"], timer.tiny)
    about = {"shape": call.shape, "dtype": call.dtype, "layout": call.layout, **call.work._asdict()}
    about["batch"] = settings["channels_last"].batch
    layouts = LAYOUTS if call.layout else ("channels_last",)
    with precision("fp32"), torch.no_grad():
        dense = {layout: case.dense(settings[layout], timer.tiny, timer.device) for layout in layouts}
        run = None
        if case.make is not None:
            operator, arguments = getattr(torch.ops.sparse_bwd, case.operator), call.arguments(timer.device)
            run = partial(operator, *arguments)
        timer.time(case.group, dense, run, about, ROUNDS, cold=True)
