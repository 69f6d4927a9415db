"""Where the bytes of a forward go: which storage is kept, by which layers, and what would free it.

The model runs once for real, with gradients. No hook is put on it (a hook would switch chains to their step-by-step
path); the keeper of a tensor is the module whose forward is running when autograd saves it. Random state and buffers
are what they were before.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .advice import how_to_free, why_dense
from .layouts import MIB, OUTSIDE, Layouts, WatchLayouts
from .saved import Kept, SavedTensors
from .simulate import call


@dataclass(frozen=True)
class Row:
    """One storage that is kept for backward.

    keepers: names of the layers that keep it, "(model)" for the model's own forward; it is free only when all let go.
    kinds: their classes; free: what would make each of them let go.
    """

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    keepers: tuple[str, ...]
    kinds: tuple[str, ...]
    free: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What is kept (`rows`, largest first), what stays dense and why, and what the memory layout costs on CPU.

    layouts: convolutions whose input or weight is not in channels_last, with the bytes that are reordered for it; they
    are in the peak, not in the saved bytes.
    """

    rows: tuple[Row, ...]
    dense: Mapping[str, str]
    layouts: Layouts

    @property
    def total(self) -> int:
        """Bytes kept in all, which `saved_bytes` of a forward on the example gives too."""
        return sum(row.nbytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; sizes in bytes."""
        return {
            "total": self.total,
            "rows": [asdict(row) for row in self.rows],
            "dense": dict(self.dense),
            "layouts": self.layouts.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"kept for backward: {self.total / MIB:.2f} MiB in {len(self.rows)} storages"]
        lines += _columns(
            [("MiB", "shape", "dtype", "kept by", "freed by"), *(_cells(row) for row in self.rows)]
        )
        if self.dense:
            lines += ["", "stays dense:", *(f"  {name}: {reason}" for name, reason in self.dense.items())]
        for finding in self.layouts.findings():
            lines += ["", finding]
        return "\n".join(lines)


def explain(model: nn.Module, example: Any) -> Explanation:
    """Explain what the forward of `example` keeps for backward; the total equals `saved_bytes` of the same forward.

    Args:
        model: converted or plain, in the mode (train or eval) that is asked about.
        example: the model's input, or a tuple or mapping of inputs.
    """
    names = {module: name or "(model)" for name, module in model.named_modules()}
    watch = WatchLayouts(names)
    with _unchanged(model), torch.enable_grad(), SavedTensors([model]) as saved, watch:
        output = call(model, example)
    kept = [storage for storage in saved.storages() if not storage.constant]
    rows = sorted((_row(storage, names) for storage in kept), key=lambda row: -row.nbytes)
    used = {chain[0] for storage in kept for chain in storage.keepers if chain}
    del output
    return Explanation(tuple(rows), why_dense(model, used), watch.layouts())


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put random state and buffers (running statistics) back afterwards."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(enabled=True):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _row(kept: Kept, names: Mapping[nn.Module, str]) -> Row:
    keepers: dict[str, tuple[str, str]] = {}
    for chain, dtype in zip(kept.keepers, kept.dtypes, strict=True):
        module = chain[0] if chain else None
        name = OUTSIDE if module is None else names.get(module, type(module).__name__)
        kind = "" if module is None else type(module).__name__
        keepers.setdefault(name, (kind, how_to_free(module, dtype)))
    return Row(
        nbytes=kept.nbytes,
        shape=kept.shapes[0],
        dtype=str(kept.dtypes[0]).removeprefix("torch."),
        keepers=tuple(keepers),
        kinds=tuple(kind for kind, _ in keepers.values()),
        free=tuple(advice for _, advice in keepers.values()),
    )


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(str(size) for size in row.shape) or "scalar"
    keepers = ", ".join(
        f"{name} ({kind})" if kind else name for name, kind in zip(row.keepers, row.kinds, strict=True)
    )
    return f"{row.nbytes / MIB:.3f}", shape, row.dtype, keepers, "; and ".join(dict.fromkeys(row.free))


def _columns(table: list[tuple[str, ...]]) -> list[str]:
    """Lines of aligned cells: the first column to the right, the last one ragged."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for first, *middle, last in table:
        cells = [cell.ljust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.rjust(widths[0]), *cells, last]))
    return lines
