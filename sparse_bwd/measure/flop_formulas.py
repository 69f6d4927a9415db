"""What `torch.utils.flop_counter.FlopCounterMode` counts for our operators.

    linear_dw, linear_dw_statistics   2 M k C_in                     M rows of x, k of C channels selected
    conv2d_dw                         2 N P (weights of dw)          N images, P positions of the output
    all others                        0

PyTorch's convention: two operations per multiplication and addition of a product (matrix product, convolution); sums,
element by element work and pooling count nothing. `work.py` counts those too, for the roofline; the products are the
same. Here dense and ours are counted alike, and a backward comes to `selection.flops.backward_flops`.

Importing this module registers the formulas; importing `sparse_bwd.measure` does. `import sparse_bwd` does not, since
PyTorch's counter takes as long to import (0.07 s) as the library itself. A counter switches the native blocks of the
CPU off while it counts, so that it sees every operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]
_OPS = torch.ops.sparse_bwd

# Sums, copies and element by element work.
NO_PRODUCT = (
    "affine_act", "affine_act_", "affine_act_dx", "affine_act_response", "max_pool2d", "max_pool2d_dx", "norm_affine",
    "response", "response_sketch", "write_back",
)  # fmt: skip


@register_flop_formula([_OPS.linear_dw, _OPS.linear_dw_statistics])
def linear_dw_flops(x: Shape, dy: Shape, rows: Shape | None, *args: Any, **kwargs: Any) -> int:
    """x [..., C_in], dy [..., C], rows [k] or None: all."""
    k = dy[-1] if rows is None else rows[0]
    return 2 * math.prod(x) * k


@register_flop_formula(_OPS.conv2d_dw)
def conv2d_dw_flops(
    x: Shape, dy: Shape, spread: Shape | None, rows: Shape | None, pick: Shape | None, size: Shape, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    """dy [N, C, OH, OW]; `size` is the shape of dw. Channels that are repeated and dropped again count nothing."""
    return 2 * dy[0] * math.prod(dy[2:]) * math.prod(size)


@register_flop_formula([getattr(_OPS, name) for name in NO_PRODUCT])
def no_flops(*args: Any, **kwargs: Any) -> int:
    """Nothing that PyTorch's counter would count."""
    return 0
