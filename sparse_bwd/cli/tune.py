"""`sparse-bwd tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparse_bwd.cli.common import Json, app, fail, reports_errors, show


@app.command()
@reports_errors
def tune(
    table: Annotated[
        list[str] | None,
        typer.Option(help="Measure only this table (may be repeated); see --show for names."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, ...")] = "cuda",
    out: Annotated[
        Path | None, typer.Option(help="Write this file instead of the one that the library reads.")
    ] = None,
    show_only: Annotated[
        bool,
        typer.Option(
            "--show", help="Measure nothing; print which tiles are in use, and where they come from."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure on this machine's GPU which tiles of Triton's kernels are fastest, and keep them for all later runs."""
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from sparse_bwd.measure import tuned
    from sparse_bwd.ops import backend, tuning

    if show_only:
        found = tuned.in_use(
            backend.architecture(torch.device(device if torch.cuda.is_available() else "cpu"))
        )
        content = json.loads(Path(found["path"]).read_text())
        show(
            {**found, "table": content}, f"{tuned.render(content)}\nTiles: {tuned.in_words(found)}.", as_json
        )
        return
    reason = tuned.why_not()
    if reason:
        fail(f"Tuning needs a GPU that runs Triton's kernels, and {reason}.")
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("tuning", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        try:
            found = tuned.run(out or tuning.user_file(), device, "sparse-bwd tune", progress, table)
        except ValueError as error:
            fail(str(error))
    show(found, f"Tiles: {tuned.in_words(found)}.", as_json)
