"""`sparse-bwd bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_bwd.cli.common import (
    BatchNorm,
    Classes,
    Device,
    Dtype,
    Json,
    Optimizer,
    app,
    reports_errors,
    show,
)


def words(text: str) -> list[str]:
    """A list separated by commas."""
    return [word for word in (part.strip() for part in text.split(",")) if word]


@app.command()
@reports_errors
def bench(
    model: Annotated[
        str,
        typer.Option(help="A torchvision or timm model, or package.module:factory (which runs that code)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.csv and bench.html.")],
    batch: Annotated[int, typer.Option("--batch", "--batch-size", min=1)] = 16,
    size: Annotated[int, typer.Option("--size", "--image-size", min=1, help="Side of the images.")] = 128,
    budgets: Annotated[
        str,
        typer.Option(help="Shares (1/16, 8.8%), weights (192311), memory (64MiB); 0 and 1: nothing and all."),
    ] = "0,1/16,1/8,1/4,1/2,1",
    policy: Annotated[str, typer.Option(help="velocity, random, sparse-update.")] = "random,velocity",
    axis: Annotated[str, typer.Option(help="out, in, or both: out,in.")] = "out",
    alternatives: Annotated[
        str,
        typer.Option(
            help="What others do: frozen-layers, masked, whole-layers, checkpoint, compile, compile-lean, "
            "compile-ours, lora, memsave; or all, or none."
        ),
    ] = "all",
    alternatives_at: Annotated[
        str | None, typer.Option(help="Budget of those that spend weights; default: the median of --budgets.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    optimizer: Optimizer = "sgd_momentum",
    batch_norm: BatchNorm = "frozen",
    layout: Annotated[
        str, typer.Option(help="channels_last or nchw, of all but dense, which takes its faster one.")
    ] = "channels_last",
    classes: Classes = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    seed: int = 0,
    case_seconds: Annotated[float, typer.Option(min=1, help="A case that takes longer is given up.")] = 900.0,
    as_json: Json = False,
) -> None:
    """What a budget buys in time and memory on a model and this machine, beside dense PyTorch and the alternatives."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from sparse_bwd.measure.bench import asked as asks
    from sparse_bwd.measure.bench.report import render
    from sparse_bwd.measure.bench.run import check_model, run
    from sparse_bwd.measure.bench.strategies import ALTERNATIVES

    asked = asks.Asked(
        model, batch, size, classes, device, dtype, optimizer, batch_norm, layout, rounds, threads, seed
    )
    others = {"all": list(ALTERNATIVES), "none": []}.get(alternatives, words(alternatives))
    cases = asks.cases(asks.Words(words(budgets), words(policy), words(axis), others, alternatives_at))
    check_model(asked)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(cases[0].name, total=len(cases))

        def progress(done: int) -> None:
            name = cases[done].name if done < len(cases) else "done"
            bar.update(task, completed=done, description=name)

        found = run(asked, cases, out, case_seconds, progress)
    show(found, f"{render(found)}\n\nbench.json, bench.csv and bench.html are in {out}", as_json)
