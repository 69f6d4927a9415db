"""`finetune`, `evaluate_run` and `predict_images`: what the command line calls, usable without it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_bwd.training.checkpoint import load_checkpoint
from sparse_bwd.training.config import RunConfig, Runtime, refuse_code
from sparse_bwd.training.data import DataOptions, open_source
from sparse_bwd.training.display import Display
from sparse_bwd.training.errors import UserError
from sparse_bwd.training.evaluate import measure_accuracy
from sparse_bwd.training.finish import CLASSES, MODEL, PREPROCESSING, RESULT, finish, is_complete
from sparse_bwd.training.images import decode
from sparse_bwd.training.loader import in_order
from sparse_bwd.training.loop import CHECKPOINT, LOG, Trainer
from sparse_bwd.training.models import build_model
from sparse_bwd.training.prepare import claim_folder, find_device, prepare
from sparse_bwd.training.ranks import Ranks, joined, lost_ranks_are_told
from sparse_bwd.training.rows import machine
from sparse_bwd.training.transforms import Preprocessing
from sparse_bwd.training.weights import fill, read_weights

# What a start leaves that is killed before its first checkpoint.
_LEFTOVERS = (LOG, f".{CHECKPOINT}.tmp")


def finetune(config: RunConfig, runtime: Runtime, after_kill: bool = False) -> dict[str, Any]:
    """Fine-tunes and leaves model, log, checkpoint and result in `runtime.out`; returns the result.

    `after_kill` allows the folder to hold what a start left that was killed before its first checkpoint.

    Everything that can be checked beforehand is, before the folder is made. Raises UserError (Diverged included),
    Stopped after Ctrl-C, OSError if a file cannot be written.
    """
    was_there = runtime.out.exists()
    with joined(runtime) as (ranks, runtime):
        prepared = prepare(config, runtime, ranks=ranks)
        if ranks.first:
            claim_folder(runtime.out, _LEFTOVERS if after_kill else ())
        with lost_ranks_are_told(ranks, runtime.out):
            ranks.wait()
            trainer = Trainer(prepared)
            try:
                trainer.start()
            except BaseException:
                if ranks.first:
                    _leave_nothing(runtime.out, keep_folder=was_there)
                raise
        return _carry_on(trainer)


def saved_config(out: Path) -> tuple[RunConfig, dict[str, Any]] | None:
    """The configuration of the run in `out` and its checkpoint; None if it was stopped before the first one."""
    path = out / CHECKPOINT
    if not path.is_file():
        return None
    saved = load_checkpoint(path)
    try:
        return RunConfig.from_json(saved["config"]), saved
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The checkpoint {path} has a configuration that this version cannot read: {error}."
        ) from error


def resume(config: RunConfig, runtime: Runtime, saved: dict[str, Any]) -> dict[str, Any]:
    """Goes on with a run from its checkpoint, bit for bit on a CPU with the same number of threads.

    `runtime.threads` None takes the number of the first part. UserError if the data is no longer the same.
    """
    if is_complete(runtime.out):
        result: dict[str, Any] = json.loads((runtime.out / RESULT).read_text())
        return result
    before = saved["machine"]
    if runtime.threads is None:
        runtime = replace(runtime, threads=before["threads"])
    with joined(runtime) as (ranks, runtime):
        return _resume(config, runtime, saved, ranks)


def _resume(config: RunConfig, runtime: Runtime, saved: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    prepared = prepare(config, runtime, resuming=True, ranks=ranks)
    if saved["classes"] != prepared.classes or saved["data"] != prepared.fingerprint:
        raise UserError(
            f"The data {config.data} is not what the run in {runtime.out} began with: images or classes were added, "
            "removed or renamed; start a new run."
        )
    trainer = Trainer(prepared)
    trainer.resume(saved)
    before = {"ranks": 1, **saved["machine"]}  # files from before there could be several have no number
    return _carry_on(trainer, _differences(before, machine(trainer.device, ranks.world)))


def _carry_on(trainer: Trainer, warnings: Sequence[str] = ()) -> dict[str, Any]:
    loader, runtime, ranks = trainer.prepared.loader, trainer.prepared.runtime, trainer.ranks
    total = trainer.recipe.epochs * loader.batches_per_epoch
    try:
        with Display(total, trainer.step, runtime.quiet) as display:
            display.lines(trainer.prepared.notes)
            for text in warnings if ranks.first else ():
                display.warn(text)
            with lost_ranks_are_told(ranks, runtime.out):
                trainer.run(display)
            result = finish(trainer)
            for text in result["warnings"] if ranks.first else ():
                display.warn(text)
    finally:
        trainer.log.close()
    return result


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"the first part of this run had {key} {before.get(key)}, this one has {value}: the result will not be the "
        "same bit for bit"
        for key, value in now.items()
        if before.get(key) != value
    ]


def _leave_nothing(out: Path, keep_folder: bool) -> None:
    """Removes what a start that failed has written."""
    for name in (*_LEFTOVERS, CHECKPOINT):
        (out / name).unlink(missing_ok=True)
    if not keep_folder:
        out.rmdir()


@dataclass(frozen=True)
class Finished:
    """A trained network with what it takes to feed it and to read it."""

    model: nn.Module
    classes: list[str]
    preprocessing: Preprocessing
    split_seed: int
    limit_test: int | None


def load_run(folder: Path, model_name: str | None = None, device: str = "cpu") -> Finished:
    """The network that a finished run left in `folder`.

    `model_name` must be given, and equal, if the run used `package.module:factory`: a name in a file runs no code.
    """
    try:
        classes = json.loads((folder / CLASSES).read_text())
        words = json.loads((folder / PREPROCESSING).read_text())
        name, preprocessing = str(words["model"]), Preprocessing.from_json(words)
        split_seed, limit_test = int(words["data"]["split_seed"]), words["data"]["limit_test"]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no finished run: {Path(error.filename).name} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The run in {folder} cannot be read: {type(error).__name__}: {error}.") from error
    refuse_code(name, model_name)
    model = build_model(name, len(classes))
    if fill(model, read_weights(folder / MODEL), str(folder / MODEL)):
        raise UserError(f"{folder / MODEL} and {folder / CLASSES} disagree about the number of classes.")
    return Finished(model.to(find_device(device)).eval(), classes, preprocessing, split_seed, limit_test)


def evaluate_run(
    run: Finished, data: str, data_root: Path = Path("data"), download: bool = False, workers: int = 0
) -> dict[str, Any]:
    """Top-1 accuracy and loss on the test images of `data`, split as in training. UserError if the classes differ."""
    source = open_source(data, DataOptions(data_root, download, run.split_seed))
    if source.classes != run.classes:
        raise UserError(
            f"The run knows {len(run.classes)} classes ({_first(run.classes)}), but the data {data} has "
            f"{len(source.classes)} ({_first(source.classes)})."
        )
    test = source.limited(None, run.limit_test, run.split_seed).test
    batches = in_order(test, run.preprocessing.evaluation(), 64, workers)
    found = measure_accuracy(run.model, batches, run.preprocessing)
    return {"data": data, "images": found.count, "accuracy": found.top1, "loss": found.loss}


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def predict_images(run: Finished, paths: Sequence[Path], top: int = 3) -> list[dict[str, Any]]:
    """Per image its path and the `top` classes with their probabilities, most likely first."""
    transform = run.preprocessing.evaluation()
    device = next(run.model.parameters()).device
    rows = []
    for path in paths:
        pixels = torch.from_numpy(transform(decode(path, str(path))).copy())
        with torch.no_grad():
            outputs = run.model(run.preprocessing.normalise(pixels[None].to(device)))
        shares, order = outputs.softmax(1)[0].sort(descending=True)
        best = [
            {"class": run.classes[number], "probability": share}
            for share, number in zip(shares.tolist()[:top], order.tolist()[:top], strict=True)
        ]
        rows.append({"image": str(path), "predictions": best})
    return rows
