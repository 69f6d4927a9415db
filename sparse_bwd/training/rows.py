"""What logs, results and checkpoints say of a run in one row."""

import dataclasses
from typing import Any

import torch

from sparse_bwd.selection.policy import Policy


def machine(device: torch.device, ranks: int) -> dict[str, Any]:
    """What the bits of a result depend on besides the configuration."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "ranks": ranks}


def selection_row(policy: Policy) -> dict[str, Any]:
    """What is trained now: budget, true cost in weights, channels, layers; bytes and operations of a step."""
    assert policy.selection is not None and policy.report is not None
    spent = dataclasses.asdict(policy.selection.summary(policy.model))
    limited = ("budget_bytes", "needed_bytes", "budget_flops", "backward_flops")
    needed = {name: getattr(policy.report, name) for name in limited}
    return {"budget": policy.budget, "total": policy.table.total, **spent, **needed}


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch for people."""
    tested = f", test accuracy {row['test_accuracy']:.2%}" if "test_accuracy" in row else ""
    return (
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, train accuracy "
        f"{row['train_accuracy']:.2%}{tested}; trained {row['cost']:,} weights in {row['channels']:,} channels of "
        f"{row['layers']} layers"
    )
