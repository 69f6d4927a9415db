"""The arithmetic: one file per operator, each registered once as `torch.ops.sparse_bwd.<op>`.

This package knows no layer. `reference.py` holds the eager oracle of every operator.
"""

from torch import Tensor
from torch import ops as _ops

from sparse_bwd.ops import affine_act, conv2d_dw, linear_dw, max_pool2d, norm_affine, write_back
from sparse_bwd.ops import response as _response  # noqa: F401  (registers the operator)


def response(new: Tensor, previous: Tensor) -> Tensor:
    """Sums [3, N, C] float64: <new, previous>, |new|^2, |previous|^2 per sample and channel; previous <- new.

    Args:
        new: the response now, [N, C, *].
        previous: the stored response, same shape, of any floating dtype; overwritten.
    """
    result: Tensor = _ops.sparse_bwd.response(new, previous)
    return result


__all__ = ["affine_act", "conv2d_dw", "linear_dw", "max_pool2d", "norm_affine", "response", "write_back"]
