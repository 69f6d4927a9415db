"""response: inner products of a channel's new and previous response, per sample, and the new one stored in its place.

    new, previous [N, C, *]  ->  sums [3, N, C] in float64: <new, previous>, |new|^2, |previous|^2;  previous <- new

The previous response may be stored in a smaller dtype than the new one. Sums are taken in float64, one sample at a
time: velocity is a small difference of cosines near 1. Where only some channels are measured, the previous response and
the sums are those of these channels, [N, k, *] and [3, N, k].

`affine_act_response` also does what follows the response in the network, x <- act(scale x + shift), with the same
reading of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bwd.ops.affine_act import affine_act_
from sparse_bwd.ops.backend import known, native, register
from sparse_bwd.ops.layout import take_channels


def _sums(previous: Tensor) -> Tensor:
    return torch.empty(3, *previous.shape[:2], dtype=torch.float64, device=previous.device)


def response_plain(new: Tensor, previous: Tensor, channels: Tensor | None = None) -> Tensor:
    new = new if channels is None else take_channels(new, channels)
    sums, planes = _sums(previous), (new.shape[1], new.shape[2:].numel())
    for i in range(new.shape[0]):
        a = new[i].reshape(planes).double()
        b = previous[i].reshape(planes).double()
        sums[0, i] = (a * b).sum(1)
        sums[1, i] = a.square().sum(1)
        sums[2, i] = b.square_().sum(1)
    previous.copy_(new)
    return sums


def channels_last(x: Tensor) -> bool | None:
    """Whether channels are the fastest dimension of the dense tensor x [N, C, *]; None where x has gaps."""
    if x.is_contiguous():
        return False
    return True if x.dim() > 2 and x.movedim(1, -1).is_contiguous() else None


def response_native(new: Tensor, previous: Tensor, channels: Tensor | None = None) -> Tensor:
    if known(new) and known(previous) and channels is not None:
        new = take_channels(new, channels)
    last = channels_last(new)
    if last is None or not (known(new) and known(previous)) or channels_last(previous) is not last:
        return NotImplemented
    sums = _sums(previous)
    native("response")(sums, previous, new, last)
    return sums


def _fake(new: Tensor, previous: Tensor, channels: Tensor | None = None) -> Tensor:
    return _sums(previous)


response = register(
    "response(Tensor new, Tensor(a!) previous, Tensor? channels=None) -> Tensor",
    response_plain,
    _fake,
    response_native,
    triton="response",
)


def affine_act_response_plain(
    x: Tensor, previous: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float
) -> Tensor:
    sums: Tensor = response(x, previous)
    affine_act_(x, scale, shift, act, low, high, False)
    return sums


def _fake_affine_act(x, previous, scale, shift, act, low, high):  # type: ignore[no-untyped-def]
    return _sums(previous)


affine_act_response = register(
    "affine_act_response(Tensor(a!) x, Tensor(b!) previous, Tensor? scale, Tensor? shift, str act, float low, "
    "float high) -> Tensor",
    affine_act_response_plain,
    _fake_affine_act,
    triton="response",
)
