"""Checkpoints of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_bwd.state_file import Format, read_state, write_state
from sparse_bwd.training.errors import UserError

_FORMAT = Format("sparse_bwd checkpoint", 1, "checkpoint")


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested dicts, lists, tuples, numbers, words and tensors, atomically. OSError if the disk is full."""
    write_state(path, state, _FORMAT)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, with tensors on the CPU in the same memory layout. UserError if it is damaged."""
    try:
        return read_state(path, _FORMAT)
    except ValueError as error:
        raise UserError(str(error)) from error
