"""`sparse-bwd evaluate` and `predict`: what a finished run can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_bwd.cli.common import DataRoot, Device, Download, Json, Model, Workers, app, reports_errors, show


@app.command()
@reports_errors
def evaluate(
    run: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    data: Annotated[str, typer.Option(help="As for finetune; its test images are used.")],
    model: Model = None,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    device: Device = "cpu",
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Top-1 accuracy of a finished run on test images."""
    from sparse_bwd import training

    found = training.evaluate_run(training.load_run(run, model, device), data, data_root, download, workers)
    show(found, f"{found['accuracy']:.2%} of {found['images']} images, loss {found['loss']:.4f}", as_json)


@app.command()
@reports_errors
def predict(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    run: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    model: Model = None,
    device: Device = "cpu",
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 3,
    as_json: Json = False,
) -> None:
    """The likeliest classes of images."""
    from sparse_bwd import training

    rows = training.predict_images(training.load_run(run, model, device), images, top)
    lines = [
        f"{row['image']}: " + ", ".join(f"{p['class']} {p['probability']:.1%}" for p in row["predictions"])
        for row in rows
    ]
    show(rows, "\n".join(lines), as_json)
