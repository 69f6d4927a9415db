"""The second stage of every sum that is split over programs: the parts are added in order, so that bits never change.

    result[i] = sum over splits s of parts[s, i]

Moves   4 splits size + e size bytes
"""

import triton
import triton.language as tl
from torch import Tensor

from sparse_bwd.ops.triton.launch import ceil_div, launch
from sparse_bwd.ops.tuning import Config

TILE = 2048  # float32 values
SMALL = 2**20  # bytes that the parts may take in any case


@triton.jit
def add_splits(parts, result, splits, size, SPLITS: tl.constexpr, VALUES: tl.constexpr):
    """A tile of several splits is read at once; row s of it adds splits s, s + SPLITS, ..., and the rows come last."""
    place = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    total = tl.zeros((SPLITS, VALUES), dtype=tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        inside = (split < splits)[:, None] & (place < size)[None, :]
        total += tl.load(parts + split[:, None] * size + place[None, :], mask=inside, other=0.0)
    tl.store(result + place, tl.sum(total, 0).to(result.dtype.element_ty), mask=place < size)


def most_splits(part: int, gathered: int) -> int:
    """How many splits of a weight gradient may there be, whose parts backward allocates: what it may take otherwise.

    Args:
        part: bytes of the partial result of one split.
        gathered: bytes of the selected slice of dy, which is read where it lies instead.
    """
    return max(1, max(gathered, SMALL) // part)


def sum_of_splits(parts: Tensor, result: Tensor) -> None:
    """Fill `result` (dense, any shape, of `size` values) from `parts` [splits, ...] in float32."""
    splits, size = len(parts), result.numel()
    rows = min(32, 1 << (splits - 1).bit_length())
    tile = {"SPLITS": rows, "VALUES": TILE // rows}
    launch(
        add_splits, (ceil_div(size, tile["VALUES"]),), Config(tile, 4, 1), {},
        parts=parts, result=result, splits=splits, size=size,
    )  # fmt: skip
