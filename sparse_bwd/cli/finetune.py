"""`sparse-bwd finetune`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_bwd.cli.common import (
    MIB,
    Count,
    Data,
    DataRoot,
    Device,
    Download,
    Json,
    Model,
    Number,
    Workers,
    app,
    fail,
    reports_errors,
    show,
)


def numbers(text: str | None) -> tuple[float, float, float] | None:
    """Three numbers, or one that stands for all three channels."""
    if text is None:
        return None
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3):
        raise typer.BadParameter(f"'{text}' is not one number or three separated by commas.")
    return (values[0], values[0], values[0]) if len(values) == 1 else (values[0], values[1], values[2])


@app.command()
@reports_errors
def finetune(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; new or empty.")],
    model: Model = None,
    data: Data = None,
    weights: Annotated[
        str | None,
        typer.Option(help="A .safetensors or .pt file, a torchvision name such as DEFAULT, or none."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="velocity, slowest, neq, trady, gradient, weight, random, sparse-update, full or frozen."
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Trained weights (192311) or a share of all (8.8%, 0.088).")
    ] = None,
    axis: Annotated[str | None, typer.Option(help="out or in; in for sparse-update and trady.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Of sparse-update: mbv2-1, ... or a .json file.")] = None,
    norm_shift: Annotated[
        bool | None, typer.Option("--norm-shift", help="Sparse-update trains the norms' shifts too.")
    ] = None,
    recursion: Annotated[str | None, typer.Option(help="Of velocity: paper or reference.")] = None,
    first: Annotated[str | None, typer.Option(help="Epoch 1 of velocity: random, full or a scheme.")] = None,
    velocity: Annotated[
        str | None, typer.Option(help="How it is measured: sketch (constant memory) or exact.")
    ] = None,
    probe: Annotated[
        str | None, typer.Option(help="Of velocity: images, not trained on, or noise (all are).")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Of neq: |velocity| that trains no more.")] = None,
    pin: Annotated[bool | None, typer.Option("--pin", help="Neq never trains again what it froze.")] = None,
    redraw: Annotated[
        bool | None, typer.Option("--redraw/--draw-once", help="Of random: for every epoch, or one for all.")
    ] = None,
    parity: Annotated[
        bool | None, typer.Option("--parity", help="Velocity and random spend as in the paper's code.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="default or paper; the options below change it.")] = None,
    batch_norm: Annotated[str | None, typer.Option(help="frozen, bias or train.")] = None,
    epochs: Count = None,
    lr: Number = None,
    batch_size: Count = None,
    warmup_epochs: Number = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adamw.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of sgd.")] = None,
    weight_decay: Number = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest L2 norm of the gradient; 0: any.")] = None,
    augment: Annotated[str | None, typer.Option(help="mild or paper.")] = None,
    flip: Annotated[bool | None, typer.Option("--flip/--no-flip", help="Mirror images at random.")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Epochs between evaluations.")] = None,
    probe_images: Annotated[
        int | None, typer.Option(min=0, help="Images to measure on, not trained on.")
    ] = None,
    image_size: Count = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the side kept when testing.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of the input: one number or three, by commas.")] = None,
    std: Annotated[str | None, typer.Option(help="Of the input: one number or three, by commas.")] = None,
    channels_last: Annotated[bool | None, typer.Option("--channels-last/--channels-first")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the head, order, augmentation and policy.")] = None,
    split_seed: Annotated[int | None, typer.Option(help="Of the split of data without a test set.")] = None,
    limit_train: Annotated[int | None, typer.Option(help="At most so many training images.")] = None,
    limit_test: Annotated[int | None, typer.Option(help="At most so many test images.")] = None,
    validation: Annotated[
        float | None,
        typer.Option(help="Test on this share of the training images, held back, not on the test images."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; a resumed run keeps its own.")
    ] = None,
    workers: Workers = 0,
    data_root: DataRoot = Path("data"),
    download: Download = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="0: only after epochs.")] = 10.0,
    checkpoint_steps: Annotated[
        int | None, typer.Option(min=1, help="A checkpoint every so many steps.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure the bytes of a step at the end.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only warnings.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a network under a budget and leave the model, a log and the result in --out."""
    from sparse_bwd import training

    options = {**context.params, "mean": numbers(mean), "std": numbers(std)}
    at_run_time = {name: options.pop(name) for name in _RUNTIME}
    for name in ("resume", "as_json"):
        options.pop(name)
    runtime = training.Runtime(**at_run_time, command=shlex.join(["sparse-bwd", *sys.argv[1:]]))
    saved = training.saved_config(out) if resume else None
    if saved is not None:
        config, state = saved
        training.check_unchanged(config, options)
        result = training.resume(config, runtime, state)
    else:
        if model is None or data is None:
            fail(
                f"A new run needs --model and --data{' (there is no checkpoint in --out yet)' if resume else ''}."
            )
        config = training.configure(training.RunConfig(model, data), options)
        result = training.finetune(config, runtime, after_kill=resume)
    if training.is_first():
        show(result, _summary(result, out), as_json)


_RUNTIME = (
    "out",
    "device",
    "threads",
    "workers",
    "data_root",
    "download",
    "checkpoint_minutes",
    "checkpoint_steps",
    "measure",
    "quiet",
)


def _budget(result: dict[str, Any]) -> str:
    """The budget of a run in the words of its unit."""
    if result["budget"] is not None:
        return f"{result['budget']:,}"
    parts = []
    if result["budget_bytes"] is not None:
        parts.append(f"{result['needed_bytes'] / MIB:.1f} of {result['budget_bytes'] / MIB:.1f} MiB")
    if result["budget_flops"] is not None:
        parts.append(f"{result['backward_flops'] / 1e9:.3f} of {result['budget_flops'] / 1e9:.3f} GFLOPs")
    return " and ".join(parts) or "none"


def _summary(result: dict[str, Any], out: Path) -> str:
    """The result of a run for people."""
    spent = f"trained {result['cost']:,} of {result['total']:,} weights (budget {_budget(result)})"
    lines = [
        f"test accuracy {result['accuracy']:.2%} after {len(result['epochs'])} epochs ({result['policy']})",
        f"{spent} in {result['channels']:,} channels of {result['layers']} layers; "
        f"{result['trained_parameters']:,} parameters with classifier and norms",
    ]
    if result["peak_bytes"] is not None:
        saved, peak = result["saved_bytes"] / MIB, result["peak_bytes"] / MIB
        lines.append(f"saved {saved:.1f} MiB, peak {peak:.1f} MiB, {result['ms_per_step']:.1f} ms per step")
    return "\n".join([*lines, f"model, log and result are in {out}"])
