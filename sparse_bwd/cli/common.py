"""What all commands share: the application, words that several of them take, errors as sentences, output."""

from __future__ import annotations

import functools
import json
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


def fail(sentence: str, code: int = 2) -> NoReturn:
    """Print the sentence to stderr and exit with `code`; 2 means that the user can put it right."""
    typer.echo(f"Error: {' '.join(sentence.split())}" if code == 2 else sentence, err=True)
    raise typer.Exit(code)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """What the user can put right becomes one sentence and exit code 2; a stopped run exits as its signal would."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        from sparse_bwd.training.errors import Stopped, UserError, is_no_space

        try:
            return command(*args, **kwargs)
        except UserError as error:
            fail(str(error))
        except Stopped as stopped:
            fail(str(stopped), 128 + stopped.signal)
        except KeyboardInterrupt:
            fail("Interrupted; a run that had begun goes on from its last checkpoint with --resume.", 130)
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            if is_no_space(error):
                fail(
                    f"There is no room left to write{where or ' to --out'}: free some space, then go on with --resume."
                )
            fail(f"{where.strip() or 'A file'} cannot be used: {error.strerror or error}.")

    return wrapper


def show(result: Any, text: str, as_json: bool) -> None:
    """Print the result of a command, as JSON or for people."""
    typer.echo(json.dumps(result, indent=2) if as_json else text)


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

# A training step in words, as `explain`, `profile` and `bench` take it.
StepBudget = Annotated[
    str, typer.Option(help="8.8%, 1/16, 192311 (weights), 64MiB, 1.5GFLOPs, or 64MiB+1.5GFLOPs.")
]
StepPolicy = Annotated[str, typer.Option(help="velocity, random, sparse-update, full or frozen.")]
Axis = Annotated[str | None, typer.Option(help="out or in.")]
BatchSize = Annotated[int, typer.Option(min=1)]
ImageSize = Annotated[int, typer.Option(min=1)]
Classes = Annotated[int, typer.Option(min=1, help="Outputs of the classifier.")]
Optimizer = Annotated[str, typer.Option(help="sgd, sgd_momentum, adam, adamw, rmsprop or adagrad.")]
BatchNorm = Annotated[str, typer.Option(help="frozen, bias or train.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last/--channels-first")]
Dtype = Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16 (autocast).")]
