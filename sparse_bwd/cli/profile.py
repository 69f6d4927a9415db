"""`sparse-bwd profile`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sparse_bwd.cli.common import (
    Axis,
    BatchNorm,
    BatchSize,
    ChannelsLast,
    Classes,
    Device,
    Dtype,
    ImageSize,
    Json,
    Optimizer,
    StepBudget,
    StepPolicy,
    app,
    reports_errors,
    show,
)


@app.command()
@reports_errors
def profile(
    model: Annotated[str, typer.Option(help="As for finetune.")],
    out: Annotated[Path, typer.Option(help="Folder for the trace, the memory, the table and profile.json.")],
    budget: StepBudget = "8.8%",
    policy: StepPolicy = "velocity",
    axis: Axis = None,
    batch_size: BatchSize = 16,
    image_size: ImageSize = 128,
    classes: Classes = 10,
    optimizer: Optimizer = "sgd_momentum",
    batch_norm: BatchNorm = "frozen",
    channels_last: ChannelsLast = True,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    seed: Annotated[int, typer.Option(help="Of the weights, the batch and the selection.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 15,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="Profile nothing; print the command line of Nsight Compute for the kernels of this operator "
            "(conv2d_dw, affine_act_, ...), which needs no GPU here."
        ),
    ] = None,
    step_only: Annotated[
        bool, typer.Option("--step-only", help="Run the warm-up and one step, and write nothing: for Nsight.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Where time and memory of a training step go: a trace, memory by kind, the most expensive layers."""
    from sparse_bwd.measure.profile.asked import Asked, prepare
    from sparse_bwd.training.explain import Question

    asked = Asked(
        Question(
            model, budget, policy, axis, batch_size=batch_size, image_size=image_size, classes=classes,
            optimizer=optimizer, batch_norm=batch_norm, channels_last=channels_last, seed=seed,
        ),
        "cuda" if kernel is not None and device == "cpu" else device,
        dtype,
    )  # fmt: skip
    if kernel is not None:
        from sparse_bwd.measure.profile import ncu

        ncu.check_operator(kernel)
        found = ncu.command(kernel, prepare(asked, "cpu"), asked.words(), out)
        out.mkdir(parents=True, exist_ok=True)
        show(asdict(found), found.as_text(), as_json)
        return
    from sparse_bwd.measure.profile import run

    if step_only:
        run.run_step(asked)
        return
    result = run.run(asked, out, top)
    show(result.to_dict(), f"{result.as_text(top)}\nin {out}", as_json)
