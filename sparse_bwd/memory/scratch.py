"""What operators allocate and give back inside themselves: the part of a peak that a run on fake tensors cannot see.

Sizes were read from the allocator's events on CPU (torch 2.14, oneDNN, two threads), x -> y with weight w:

    convolution, channels_last        w, put into oneDNN's own order
    convolution, NCHW                 w, and the larger of x and y
    weight gradient, channels_last    twice dw
    weight gradient, NCHW             x and dy
    conv2d_dw                         the same for the gathered slice of dy, and that slice

Elsewhere (other devices, other operators) the estimate is 0.
"""

from typing import Any

import torch
from torch import Tensor


def scratch_bytes(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Estimated bytes that one call of `func` takes beside its result and gives back before it returns."""
    aten = torch.ops.aten
    if not args or not isinstance(args[0], Tensor) or args[0].device.type != "cpu":
        return 0
    if func is aten.convolution.default:
        x, w = args[:2]
        return _forward(x, w, result)
    if func is aten.convolution_backward.default:
        dy, x, w = args[:3]
        needs_dx, needs_dw = args[-1][:2]
        dx = _forward(x, w, dy) if needs_dx else 0
        dw = _weight_gradient(x, dy.nbytes, w.nbytes) if needs_dw else 0
        return max(dx, dw)
    if func is torch.ops.sparse_bwd.conv2d_dw.default:
        x, dy, spread, rows = args[:4]
        dy_slice = dy.nbytes if rows is None else dy.nbytes // dy.shape[1] * rows.numel()
        x_slice = 0 if spread is None else x.nbytes // x.shape[1] * spread.numel()
        return x_slice + (0 if rows is None else dy_slice) + _weight_gradient(x, dy_slice, result.nbytes)
    return 0


def _in_pixels(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _forward(x: Tensor, w: Tensor, y: Tensor) -> int:
    return w.nbytes + (0 if _in_pixels(x) else max(x.nbytes, y.nbytes))


def _weight_gradient(x: Tensor, dy_bytes: int, dw_bytes: int) -> int:
    return 2 * dw_bytes if _in_pixels(x) else x.nbytes + dy_bytes
