"""The arithmetic: one file per operator, each registered once as `torch.ops.sparse_bwd.<op>`.

This package knows no layer. `reference.py` holds the eager oracle of every operator.
"""

from torch import Tensor
from torch import ops as _ops

from sparse_bwd.ops import affine_act, conv2d_dw, linear_dw, max_pool2d, norm_affine, write_back
from sparse_bwd.ops import response as _response  # noqa: F401  (registers the operator)
from sparse_bwd.ops import sketch as _sketch  # noqa: F401


def response(new: Tensor, previous: Tensor, channels: Tensor | None = None) -> Tensor:
    """Sums [3, N, k] float64: <new, previous>, |new|^2, |previous|^2 per sample and channel; previous <- new.

    Args:
        new: the response now, [N, C, *].
        previous: the stored response of the measured channels, [N, k, *], of any floating dtype; overwritten.
        channels: those channels, int64 [k]; None = all C.
    """
    result: Tensor = _ops.sparse_bwd.response(new, previous, channels)
    return result


def affine_act_response(
    x: Tensor, previous: Tensor, scale: Tensor | None, shift: Tensor | None, act: str, low: float, high: float
) -> Tensor:
    """`response` of x and `previous`, and x <- act(scale x + shift) in the same pass (`affine_act.py`).

    Args:
        x: the response now, [N, C, *]; overwritten.
        previous: the stored response, same shape; overwritten by x as it was.
        scale, shift: float32 [C], both or neither.
        act: "none", "relu", "hardtanh" (from `low` to `high`) or "leaky_relu" (slope `low`).
    """
    result: Tensor = _ops.sparse_bwd.affine_act_response(x, previous, scale, shift, act, low, high)
    return result


def response_sketch(new: Tensor, sums: Tensor, seed: int, start: int) -> None:
    """Add to `sums` the sketch of a response: r random sums of its values, normalised per sample (`sketch.py`).

    Args:
        new: the response now, [N, C, *].
        sums: float64 [C, r]; added to.
        seed: of the random signs.
        start: values of earlier calls that went into `sums`, each sample counting one more.
    """
    _ops.sparse_bwd.response_sketch(new, sums, seed, start)


__all__ = [
    "affine_act",
    "affine_act_response",
    "conv2d_dw",
    "linear_dw",
    "max_pool2d",
    "norm_affine",
    "response",
    "response_sketch",
    "write_back",
]
