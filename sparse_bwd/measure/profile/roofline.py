"""The roofline: how fast work could be at best on this machine.

    least time of a call  =  max(bytes / B, operations / P)          B, P: the ceilings, measured on the spot
    share of the roofline =  sum of the least times of all calls / measured time

B is the bandwidth of a copy of a large tensor, bytes read and written; P the speed of large matrix products; both with
the threads and in the dtype of the step. The tensor is copied in pieces and the products are of two sizes, since a long
call on a machine with other work is sure to be interrupted: B is the 80th percentile of the pieces' speeds, P the
fastest product. A share above 100 % says that data stayed in a cache, which is faster than what B measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_bwd.measure.kernels import precision
from sparse_bwd.measure.meter import meter_for, quantiles
from sparse_bwd.measure.training_step import DTYPES
from sparse_bwd.measure.work import Work

ROUNDS = 5


class Sizes(NamedTuple):
    """Bytes of a piece, pieces of the copied tensor (beyond any cache), widths of square matrices."""

    piece: int
    pieces: int
    widths: tuple[int, ...]


SIZES = {"cpu": Sizes(16 * 2**20, 16, (512, 1024)), "cuda": Sizes(256 * 2**20, 8, (4096, 8192))}


class Ceilings(NamedTuple):
    """bandwidth in GB/s = 1e9 bytes read and written per second; product in GFLOP/s = 1e9 operations per second."""

    bandwidth: float
    product: float

    def least_ms(self, works: Iterable[Work]) -> float:
        """The least time of some calls, one after the other."""
        return sum(max(work.bytes / self.bandwidth, work.operations / self.product) / 1e6 for work in works)


def ceilings(device: str, dtype: str) -> Ceilings:
    """Measured now; takes a second on a CPU."""
    sizes = SIZES[torch.device(device).type]
    return Ceilings(_bandwidth(device, sizes), _product(device, dtype, sizes))


def _bandwidth(device: str, sizes: Sizes) -> float:
    source = torch.ones((sizes.pieces, sizes.piece), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copies = {i: {"": lambda i=i: target[i].copy_(source[i])} for i in range(sizes.pieces)}
    taken = meter_for(device, ROUNDS).samples(copies)
    fast = quantiles([ms for parts in taken.values() for ms in parts[""]])[0]
    return 2 * sizes.piece / fast / 1e6


def _product(device: str, dtype: str, sizes: Sizes) -> float:
    def matrices(width: int) -> Tensor:
        return torch.ones((2, width, width), dtype=DTYPES[dtype] or torch.float32, device=device)

    pairs = {width: matrices(width) for width in sizes.widths}
    products = {width: {"": lambda pair=pair: pair[0] @ pair[1]} for width, pair in pairs.items()}
    with precision(dtype):
        taken = meter_for(device, ROUNDS).samples(products)
    return max(2 * width**3 / min(parts[""]) / 1e6 for width, parts in taken.items())
