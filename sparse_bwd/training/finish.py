"""The end of a run: what a step costs, the trained network with plain keys, and the result in numbers."""

import copy
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparse_bwd as sb
from sparse_bwd.files import write_json, write_safetensors
from sparse_bwd.selection.flops import backward_flops
from sparse_bwd.training.loop import Trainer
from sparse_bwd.training.optimizer import make_optimizer
from sparse_bwd.training.rows import selection_row
from sparse_bwd.training.state import named_trainable

MODEL, CLASSES, PREPROCESSING, RESULT = (
    "model.safetensors",
    "classes.json",
    "preprocessing.json",
    "result.json",
)
RESULT_VERSION = 1
# A training loss this much above that of guessing means that nothing was learned.
_WORSE_THAN_GUESSING = 1.05
# A fall of the test accuracy from its best epoch that is more than noise.
_FALL = 0.1


def finish(trainer: Trainer) -> dict[str, Any]:
    """Writes model, class names, preprocessing and, last of all, result.json, on rank 0; returns the result.

    The model comes out restored: plain torch layers.
    """
    first = trainer.ranks.first
    memory = measure_step(trainer) if trainer.prepared.runtime.measure and first else {}
    result = summarise(trainer, memory)
    out = trainer.out
    sb.restore(trainer.model)
    if not first:
        return result
    trained = {name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}
    write_safetensors(out / MODEL, trained, {"format": "pt", "model": trainer.config.model})
    write_json(out / CLASSES, trainer.prepared.classes)
    write_json(out / PREPROCESSING, description(trainer))
    write_json(out / RESULT, result)
    shown = ("accuracy", "cost", "saved_bytes", "peak_bytes", "warnings")
    trainer.log.write("end", **{key: result[key] for key in shown})
    trainer.log.sync()
    return result


def description(trainer: Trainer) -> dict[str, Any]:
    """What `evaluate` and `predict` need besides the weights and the class names."""
    config = trainer.config
    return {
        "version": RESULT_VERSION,
        "model": config.model,
        **config.preprocessing.to_json(),
        "data": {"split_seed": config.split_seed, "limit_test": config.limit_test},
    }


def summarise(trainer: Trainer, memory: dict[str, int]) -> dict[str, Any]:
    """Everything that a table of runs needs."""
    config, last = trainer.config, trainer.history[-1]
    return {
        "version": RESULT_VERSION,
        "model": config.model,
        "data": config.data,
        "policy": config.policy,
        "axis": config.resolved_axis,
        "batch_norm": config.recipe.batch_norm,
        **selection_row(trainer.policy),
        "trained_parameters": sum(p.numel() for p in named_trainable(trainer.model).values()),
        "accuracy": last["test_accuracy"],
        "accuracy_per_epoch": [row.get("test_accuracy") for row in trainer.history],
        "backward_flops": memory.get("backward_flops"),
        "saved_bytes": memory.get("saved"),
        "peak_bytes": memory.get("peak"),
        "resident_bytes": memory.get("resident"),
        "training_bytes": memory.get("training"),
        "ms_per_step": round(statistics.median(trainer.step_ms), 3) if trainer.step_ms else None,
        "steps": trainer.step,
        "seed": config.seed,
        "epochs": trainer.history,
        "warnings": find_collapse(trainer.history, len(trainer.prepared.classes)),
        "config": config.to_json(),
        "command": trainer.prepared.runtime.command,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "ranks": trainer.ranks.world,
        "device": str(trainer.device),
    }


def measure_step(trainer: Trainer) -> dict[str, int]:
    """Bytes of a step, measured on a copy of the model and real images, and the operations of its backward pass.

    saved: kept from forward to backward; peak: the highest of the third step above what is alive before it, which is
    `resident`; training: the peak and what training holds between steps beyond the network and the batch.
    backward_flops: of all convolutions and linear layers, counted (`selection.flops`).
    """
    model = copy.deepcopy(trainer.model).train()
    config, recipe = trainer.config, trainer.recipe
    images, targets = next(trainer.prepared.loader.epoch(0))
    inputs = config.preprocessing.normalise(images.to(trainer.device))
    if config.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = targets.to(trainer.device)
    loss_fn = nn.functional.cross_entropy
    saved = sb.memory.saved_bytes(lambda: loss_fn(model(inputs), targets), model)
    # The learning rate has no part in the bytes; with 0 the steps cannot diverge.
    optimizer = make_optimizer(recipe, model, lr=0.0)
    peak = sb.memory.step_peak(model, loss_fn, optimizer, (inputs, targets))
    held = sb.memory.held_between_steps(model, optimizer) + trainer.policy.velocity_bytes
    return {
        "backward_flops": sum(backward_flops(model, None, inputs).values()),
        "saved": saved,
        "peak": peak.peak,
        "resident": peak.resident,
        "training": peak.peak + held,
    }


def find_collapse(history: list[dict[str, Any]], classes: int) -> list[str]:
    """Sentences about runs that ended in finite numbers and yet went wrong."""
    found = []
    first, last = history[0]["train_loss"], history[-1]["train_loss"]
    guessing = math.log(classes)
    if last > _WORSE_THAN_GUESSING * guessing:
        found.append(
            f"the training loss ended at {last:.3f}, above the {guessing:.3f} of guessing: nothing was learned; "
            "lower --lr"
        )
    elif len(history) > 1 and last > first:
        found.append(f"the training loss rose from {first:.3f} in the first epoch to {last:.3f}; lower --lr")
    tested = [row["test_accuracy"] for row in history if "test_accuracy" in row]
    if tested[-1] < max(tested) - _FALL:
        found.append(f"the test accuracy fell from {max(tested):.1%} to {tested[-1]:.1%}; lower --lr")
    if tested[-1] <= 1.2 / classes:
        found.append(f"the test accuracy of {tested[-1]:.1%} is that of guessing among {classes} classes")
    return found


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import timm
    import torchvision

    return {
        "sparse_bwd": sb.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def is_complete(out: Path) -> bool:
    """Whether the run in `out` has written its last file."""
    return (out / RESULT).is_file()
