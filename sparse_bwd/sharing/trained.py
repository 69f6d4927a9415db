"""What training has changed in a network, apart from the base it began with; as a value and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_bwd.nn.slot import Slot
from sparse_bwd.selection.selection import Selection
from sparse_bwd.sharing.parts import Part
from sparse_bwd.state_file import Format, read_state, write_state

_FORMAT = Format("sparse_bwd trained channels", 1, "file of trained channels")


@dataclass(frozen=True, eq=False)
class Trained:
    """The trained channels of a network. `str()` is a line for people.

    Args:
        parts: key of the state dict -> its trained slices, on the CPU.
        base: key -> hash of the base's tensor, for every tensor that `parts` does not hold whole.
        selection: what was trained last, to go on with (`sb.apply(model, trained.selection)`); None where the network
            was restored already or several were merged.
        notes: the user's own words.
    """

    parts: Mapping[str, Part]
    base: Mapping[str, str]
    selection: Selection | None
    notes: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the slices, without their indices."""
        return sum(part.values.nbytes for part in self.parts.values())

    def __str__(self) -> str:
        count = sum(part.values.numel() for part in self.parts.values())
        of_whole = sum(part.slot.index is None for part in self.parts.values())
        return (
            f"{count:,} trained values in {len(self.parts)} tensors ({of_whole} of them whole), "
            f"{self.nbytes / 2**20:.2f} MiB"
        )

    def save(self, path: str | Path) -> None:
        """Write the file: under another name first, then renamed. OSError if it cannot be written."""
        parts = {
            name: {"values": part.values, "index": part.slot.index, "dim": part.slot.dim, "groups": part.slot.groups}
            for name, part in self.parts.items()
        }  # fmt: skip
        selection = None if self.selection is None else self.selection.to_dict()
        state = {"parts": parts, "base": dict(self.base), "selection": selection, "notes": dict(self.notes)}
        write_state(Path(path), state, _FORMAT)

    @classmethod
    def read(cls, path: str | Path) -> Trained:
        """Read a file; no code in it is run. ValueError, in a sentence, if it is damaged or something else."""
        state = read_state(Path(path), _FORMAT)
        try:
            parts = {name: _part(entry) for name, entry in state["parts"].items()}
            base, notes = _words(state["base"]), _words(state["notes"])
            saved = state["selection"]
            return cls(parts, base, None if saved is None else Selection.from_dict(saved), notes)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"The {_FORMAT.noun} {path} is damaged: {error}.") from error


def _part(entry: Mapping[str, Any]) -> Part:
    index, values, dim, groups = entry["index"], entry["values"], entry["dim"], entry["groups"]
    if not isinstance(values, Tensor) or dim not in (0, 1) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"it holds no slices where they should be ({entry})")
    if index is not None:
        ordered = isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1
        if not ordered or bool((index[1:] <= index[:-1]).any()):
            raise ValueError("its channels are not sorted and unique")
    return Part(Slot(index, dim, groups), values)


def _words(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value.values()):
        raise ValueError(f"words were expected, not {json.dumps(value, default=str)[:60]}")
    return value
