"""Which devices a step can be measured on."""

from __future__ import annotations

import torch

from sparse_bwd.training.errors import UserError, unknown


def measurable(device: str, dtype: str) -> str:
    """The kind of a device, "cpu" or "cuda". UserError for others, and for a dtype that the kind does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise unknown("device", device, ("cpu", "cuda")) from None
    if kind not in ("cpu", "cuda"):
        raise UserError(f"Time and memory can be measured on cpu and cuda, not on {kind}.")
    if kind == "cpu" and dtype == "tf32":
        raise UserError("The dtype tf32 is one of GPUs; on cpu take fp32 or bf16.")
    return kind


def check_present(device: str) -> None:
    """UserError if a GPU is asked for where there is none."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no GPU that this PyTorch can use; take --device cpu.")
