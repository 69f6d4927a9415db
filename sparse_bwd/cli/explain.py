"""`sparse-bwd explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_bwd.cli.common import (
    Axis,
    BatchNorm,
    BatchSize,
    ChannelsLast,
    Classes,
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
def explain(
    model: Annotated[str, typer.Option(help="As for finetune.")],
    budget: StepBudget = "8.8%",
    fit: Annotated[
        str | None,
        typer.Option(help="A total, network included (32MiB): find the batch, axis and budget that fit."),
    ] = None,
    policy: StepPolicy = "velocity",
    axis: Axis = None,
    scheme: Annotated[str, typer.Option(help="Of sparse-update: mbv2-1, ... or a .json file.")] = "mbv2-1",
    batch_size: BatchSize = 16,
    image_size: ImageSize = 128,
    classes: Classes = 10,
    optimizer: Optimizer = "sgd_momentum",
    batch_norm: BatchNorm = "frozen",
    channels_last: ChannelsLast = True,
    weights: Annotated[
        str, typer.Option(help="As for finetune; they change no byte, but which channels a scheme takes.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Of the selection that is drawn.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for plan.json and plan.png.")] = None,
    as_json: Json = False,
) -> None:
    """Before training, one page that says what fits: the memory and work of a step, layer by layer."""
    from sparse_bwd.training import explain as asks

    asked = asks.Question(
        model, budget, policy, axis, scheme, batch_size, image_size, classes, optimizer, batch_norm,
        channels_last, weights, seed,
    )  # fmt: skip
    if fit is not None:
        _fit(asked, fit, out, as_json)
        return
    from sparse_bwd.files import write_json
    from sparse_bwd.measure.plan_page import draw, render

    plan = asks.explain_plan(asked)
    text = render(plan)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "plan.json", plan.to_dict())
        text += f"\n\n{_figure(draw, plan.to_dict(), out)} in {out}"
    show(plan.to_dict(), text, as_json)


def _figure(draw: Any, plan: dict[str, Any], out: Path) -> str:
    """Draw where matplotlib is installed, and say what is in the folder."""
    try:
        draw(plan, out / "plan.png")
    except ImportError:
        return "plan.json (no figure: pip install matplotlib)"
    return "plan.json and plan.png"


def _fit(asked: Any, text: str, out: Path | None, as_json: bool) -> None:
    from sparse_bwd.files import write_json
    from sparse_bwd.measure.plan_page import fits_to_dict, render_fits
    from sparse_bwd.training.explain import explain_fit, parse_total

    total = parse_total(text)
    found, best, network = explain_fit(asked, total)
    result = fits_to_dict(found, best, total, network)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "fit.json", result)
    show(result, render_fits(found, best, total, network), as_json)
