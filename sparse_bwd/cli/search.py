"""`sparse-bwd search`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_bwd.cli.common import (
    Count,
    Data,
    DataRoot,
    Device,
    Download,
    Json,
    Model,
    Number,
    Word,
    Workers,
    app,
    fail,
    reports_errors,
    show,
)
from sparse_bwd.cli.finetune import numbers


@app.command()
@reports_errors
def search(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the search; new or empty.")],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a scheme: weights (192311), a share (8.8%) or memory (64MiB); may be repeated."
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    weights: Annotated[str | None, typer.Option(help="A file, a name such as DEFAULT, or none.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Convolutions to measure, counted from the input: 27,30,36-39.")
    ] = None,
    last: Annotated[int | None, typer.Option(min=1, help="The last so many instead (20).")] = None,
    ratios: Annotated[str | None, typer.Option(help="Of a layer's channels: 1/8,1/4,1/2,1.")] = None,
    biases: Annotated[str | None, typer.Option(help="Numbers of last biases to measure: 4,8,16.")] = None,
    beside: Annotated[
        int | None,
        typer.Option(min=0, help="Biases beside which weights are measured; all that are in reach."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Of the runs of each point: 0-2.")] = None,
    validation: Annotated[
        float | None, typer.Option(help="Share of the training images to measure accuracy on (0.2).")
    ] = None,
    norm_shift: Annotated[
        bool | None,
        typer.Option(
            "--norm-shift/--no-norm-shift",
            help="Biases include the norms' shifts; on where convolutions have none.",
        ),
    ] = None,
    axis: Annotated[str | None, typer.Option(help="out or in (in).")] = None,
    recipe: Annotated[str | None, typer.Option(help="default or paper; the options below change it.")] = None,
    batch_norm: Annotated[str | None, typer.Option(help="frozen, bias or train.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each run (1).")] = None,
    lr: Number = None,
    batch_size: Count = None,
    warmup_epochs: Number = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd.")] = None,
    weight_decay: Number = None,
    clip_norm: Number = None,
    augment: Word = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip")] = None,
    image_size: Count = None,
    crop_pct: Number = None,
    mean: Word = None,
    std: Word = None,
    channels_last: Annotated[bool | None, typer.Option("--channels-last/--channels-first")] = None,
    split_seed: Annotated[int | None, typer.Option(help="Of the validation and test splits.")] = None,
    limit_train: Annotated[int | None, typer.Option(help="At most so many training images.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in --out, or join others at it.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that measure.")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="An optuna storage URL that machines share; a file in --out otherwise.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study in the storage.")] = None,
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="Measure what velocity's choosing costs, too."),
    ] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each process.")] = None,
    workers: Workers = 0,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only warnings.")] = False,
    as_json: Json = False,
) -> None:
    """Find which layers, ratios and biases to train under a budget, by training each for a short time."""
    from sparse_bwd import training
    from sparse_bwd.training import search as searching

    options = {**context.params, "mean": numbers(mean), "std": numbers(std)}
    given = {name: options[name] for name in _RUN}
    runtime = training.Runtime(**{name: options[name] for name in _RUNTIME}, measure=False)
    before = searching.saved_search(out) if resume else None
    if before is None:
        if model is None or data is None or not budget:
            fail("A new search needs --model, --data and --budget.")
        run = searching.short_run(model, data, given, norm_shift)
        base = searching.SearchConfig(run, searching.Grid(), ())
    else:
        base = before
        training.check_unchanged(base.run, {**given, "model": model, "data": data, "norm_shift": norm_shift})
    grid = searching.changed_grid(base.grid, layers, last, ratios, biases, beside, seeds)
    changes: dict[str, Any] = {
        "budgets": tuple(budget) if budget else None,
        "validation": validation,
        "storage": storage,
        "study": study,
        "compare": compare,
    }
    config = replace(base, grid=grid, **{name: value for name, value in changes.items() if value is not None})
    record = searching.search(config, runtime, jobs, resume)
    show(record, _summary(record, out), as_json)


_RUN = (
    "weights", "axis", "recipe", "batch_norm", "epochs", "lr", "batch_size", "warmup_epochs", "optimizer",
    "momentum", "weight_decay", "clip_norm", "augment", "flip", "image_size", "crop_pct", "mean", "std",
    "channels_last", "split_seed", "limit_train",
)  # fmt: skip
_RUNTIME = ("out", "device", "threads", "workers", "data_root", "download", "quiet")


def _summary(record: dict[str, Any], out: Path) -> str:
    """The result of a search for people."""
    from sparse_bwd.training import search as searching

    cost = record["choosing"]["search"]
    return "\n".join(
        [
            *searching.schemes_table(record),
            "",
            f"{cost['runs']} training runs in {cost['seconds']:,.0f} s; "
            f"tables, figure and scheme files are in {out}. To train:",
            *(searching.finetune_words(record, row, str(out)) for row in record["schemes"]),
        ]
    )
