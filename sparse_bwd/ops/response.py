"""response: inner products of a channel's new and previous response, per sample, and the new one stored in its place.

    new, previous [N, C, *]  ->  <new, previous>, |new|^2, |previous|^2, each [N, C] in float64;  previous <- new

The previous response may be stored in a smaller dtype than the new one. Sums are taken in float64, one sample at a
time: velocity is a small difference of cosines near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bwd.ops.backend import register


def response_plain(new: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, c = new.shape[:2]
    dot, new_sq, old_sq = (torch.zeros(n, c, dtype=torch.float64, device=new.device) for _ in range(3))
    for i in range(n):
        a = new[i].reshape(c, -1).double()
        b = previous[i].reshape(c, -1).double()
        dot[i] = (a * b).sum(1)
        new_sq[i] = a.square().sum(1)
        old_sq[i] = b.square_().sum(1)
    previous.copy_(new)
    return dot, new_sq, old_sq


def _fake(new: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, c = new.shape[:2]
    return tuple(torch.empty(n, c, dtype=torch.float64, device=new.device) for _ in range(3))  # type: ignore[return-value]


register("response(Tensor new, Tensor(a!) previous) -> (Tensor, Tensor, Tensor)", response_plain, _fake)
