"""The command line: parses, calls, prints. Heavy imports wait until a command runs, so that --help is quick."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

try:
    import typer
except ImportError:  # a bare install has no command line
    raise SystemExit(
        "The command line needs the extra 'training': pip install 'sparse-bwd[training]'."
    ) from None

P = ParamSpec("P")
R = TypeVar("R")
MIB = 2**20

app = typer.Typer(
    help="Fine-tune only selected channels of a network: the rest costs no work and no memory in backward.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of `sparse-bwd`."""
    app()


def _fail(sentence: str, code: int = 2) -> NoReturn:
    typer.echo(f"Error: {' '.join(sentence.split())}" if code == 2 else sentence, err=True)
    raise typer.Exit(code)


def _reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """What the user can put right becomes one sentence and exit code 2; a stopped run exits as its signal would."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        from sparse_bwd.training.errors import Stopped, UserError, is_no_space

        try:
            return command(*args, **kwargs)
        except UserError as error:
            _fail(str(error))
        except Stopped as stopped:
            _fail(str(stopped), 128 + stopped.signal)
        except KeyboardInterrupt:
            _fail("Interrupted; a run that had begun goes on from its last checkpoint with --resume.", 130)
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            if is_no_space(error):
                _fail(
                    f"There is no room left to write{where or ' to --out'}: free some space, then go on with --resume."
                )
            _fail(f"{where.strip() or 'A file'} cannot be used: {error.strerror or error}.")

    return wrapper


def _numbers(text: str | None) -> tuple[float, float, float] | None:
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


Model = Annotated[
    str | None,
    typer.Option(help="A torchvision or timm model, or package.module:factory (which runs that code)."),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="A folder (train/CLASS/*, test/CLASS/* or CLASS/*), digits, or a torchvision data set."
    ),
]
DataRoot = Annotated[Path, typer.Option(help="Where torchvision's data sets are.")]
Download = Annotated[bool, typer.Option(help="Let torchvision download the data set into --data-root.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0: in this one.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Count = Annotated[int | None, typer.Option(min=1)]
Number = Annotated[float | None, typer.Option()]
Word = Annotated[str | None, typer.Option()]


@app.command()
@_reports_errors
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
    recipe: Annotated[str | None, typer.Option(help="default or paper; the options below change it.")] = None,
    batch_norm: Annotated[str | None, typer.Option(help="frozen, bias or train.")] = None,
    epochs: Count = None,
    lr: Number = None,
    batch_size: Count = None,
    warmup_epochs: Number = None,
    momentum: Number = None,
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

    options = {**context.params, "mean": _numbers(mean), "std": _numbers(std)}
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
            _fail(
                f"A new run needs --model and --data{' (there is no checkpoint in --out yet)' if resume else ''}."
            )
        config = training.configure(training.RunConfig(model, data), options)
        result = training.finetune(config, runtime, after_kill=resume)
    _print(result, _summary(result, out), as_json)


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


@app.command()
@_reports_errors
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
    _print(found, f"{found['accuracy']:.2%} of {found['images']} images, loss {found['loss']:.4f}", as_json)


@app.command()
@_reports_errors
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
    _print(rows, "\n".join(lines), as_json)


@app.command()
@_reports_errors
def doctor(as_json: Json = False) -> None:
    """What serves each operator on this machine and why, and what would make it faster."""
    from sparse_bwd.doctor import examine, render

    found = examine()
    _print(found, render(found), as_json)


def _print(result: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(result, indent=2) if as_json else text)


def _summary(result: dict[str, Any], out: Path) -> str:
    """The result of a run for people."""
    budget = "none" if result["budget"] is None else f"{result['budget']:,}"
    spent = f"trained {result['cost']:,} of {result['total']:,} weights (budget {budget})"
    lines = [
        f"test accuracy {result['accuracy']:.2%} after {len(result['epochs'])} epochs ({result['policy']})",
        f"{spent} in {result['channels']:,} channels of {result['layers']} layers; "
        f"{result['trained_parameters']:,} parameters with classifier and norms",
    ]
    if result["peak_bytes"] is not None:
        saved, peak = result["saved_bytes"] / MIB, result["peak_bytes"] / MIB
        lines.append(f"saved {saved:.1f} MiB, peak {peak:.1f} MiB, {result['ms_per_step']:.1f} ms per step")
    return "\n".join([*lines, f"model, log and result are in {out}"])
