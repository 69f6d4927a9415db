"""response_sketch: r numbers that keep the squared distance between a channel's normalised responses, in expectation.

    u = the channel's responses, each divided by its norm, one sample behind the other; after the P values of a sample
        stands one more: 1 where its response is zero, else 0. So every sample has norm 1, a zero response is nearest to
        another zero response, and perpendicular to all others.
    sums[c, b] += sum of sign(j) u[c, j] over all j = b (mod r), j counted from `start`;  sign(j) = +1 or -1

For any u, v of one layer <S u, S v> = sum over j, k of one bucket of sign(j) sign(k) u_j v_k, whose expectation over
independent signs is <u, v>. Where r is at least the length of u, every j has a bucket of its own and S u is u itself
up to signs: nothing is lost. The signs come from a counter (`signs`): nothing but the seed is stored.

Sums are taken in float64, one sample at a time. The native kernel reads the responses once, for the sums and the norm;
it adds the values of a bucket in an order that depends on the memory layout, never on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bwd.ops.backend import known, native, register
from sparse_bwd.ops.response import channels_last

_WORD = 0xFFFFFFFF
# The second factor is 0x846CA68B - 2**32: modulo 2**32 the same, and the product of 32 and 31 bits fits an int64.
_FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)


def _mix(x: Tensor) -> Tensor:
    """Permutation of the 32-bit words in int64 x: xor-shift-multiply, as the finaliser of MurmurHash3."""
    x = (x ^ (x >> 16)) * _FACTORS[0] & _WORD
    x = (x ^ (x >> 15)) * _FACTORS[1] & _WORD
    return x ^ (x >> 16)


def signs(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """sign(j) for j = start ... start + count - 1, float64: a hash of (seed, j), so that any j can come first."""
    j = torch.arange(start, start + count, device=device)
    key = torch.zeros((), dtype=torch.int64, device=device)
    for word in (seed & _WORD, seed >> 32 & _WORD, j >> 32, j & _WORD):
        key = _mix(key ^ word)
    return (1 - 2 * (key & 1)).double()


def response_sketch_plain(new: Tensor, sums: Tensor, seed: int, start: int) -> None:
    n, c = new.shape[:2]
    p, r = new.shape[2:].numel(), sums.shape[1]
    buckets = -(-(p + r - 1) // r) * r
    row = torch.empty(c, buckets, dtype=torch.float64, device=new.device)
    for i in range(n):
        first = start + i * (p + 1)
        sign, offset = signs(seed, first, p + 1, new.device), first % r
        values = row.zero_()[:, offset : offset + p]
        values.copy_(new[i].reshape(c, p))
        norm = torch.linalg.vector_norm(row, dim=1)
        zero = norm == 0
        values.mul_(sign[:p])
        sums.add_(row.view(c, buckets // r, r).sum(1).div_(norm.masked_fill_(zero, 1.0)[:, None]))
        sums[:, (first + p) % r].add_(zero * sign[p])


def response_sketch_native(new: Tensor, sums: Tensor, seed: int, start: int) -> None:
    last = channels_last(new)
    if last is None or not known(new) or not sums.is_contiguous() or sums.dtype is not torch.float64:
        return NotImplemented
    native("response_sketch")(sums, new, seed, start, last)
    return None


def _fake(new: Tensor, sums: Tensor, seed: int, start: int) -> None:
    return None


register(
    "response_sketch(Tensor new, Tensor(a!) sums, int seed, int start) -> ()",
    response_sketch_plain,
    _fake,
    response_sketch_native,
    devices=("cpu",),
    triton="response_sketch",
)
