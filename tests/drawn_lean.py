"""Random cases of the lean neighbours, legal and illegal, held to their stock layers bit by bit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from tests.cases import LAYOUTS
from tests.drawn import DTYPES, Pick, attempt, integers
from tests.meter import saved_bytes
from tests.tolerance import assert_same_bits

SPECIALS = (float("nan"), float("inf"), float("-inf"), -0.0)


def draw_pool(pick: Pick) -> tuple[type[nn.Module], type[nn.Module], dict[str, Any], tuple[int, ...]]:
    """Options of a MaxPool2d and an input shape; some windows do not fit, some paddings are too large."""
    options = {
        "kernel_size": pick((1, 2, 2, 3, (1, 3), (3, 2), 5, 17)),
        "stride": pick((None, 1, 2, 3, (2, 1))),
        "padding": pick((0, 0, 0, 1, 1, (1, 0), 2)),
        "dilation": pick((1, 1, 1, 2, (1, 3))),
        "return_indices": pick((False, False, False, True)),
        "ceil_mode": pick((False, True)),
    }
    shape = (*pick(((2,), (1,), (), (0,), (3,))), pick((1, 3, 0)) if pick(range(30)) == 0 else 3)
    # No image smaller than the dilation (3): PyTorch's backward writes out of bounds where a window lies in padding.
    return nn.MaxPool2d, sb.MaxPool2d, options, (*shape, pick((2, 5, 8, 20)), pick((3, 4, 7, 18)))


def draw_activation(pick: Pick) -> tuple[type[nn.Module], type[nn.Module], dict[str, Any], tuple[int, ...]]:
    """An activation with its options, and a shape of any number of dimensions."""
    stock, ours, options = pick(
        (
            (nn.ReLU, sb.ReLU, {}),
            (nn.ReLU6, sb.ReLU6, {}),
            (nn.Hardtanh, sb.Hardtanh, {"min_val": pick((-2.0, 0.0)), "max_val": pick((1.0, 2.0))}),
            (nn.LeakyReLU, sb.LeakyReLU, {"negative_slope": pick((0.25, 0.5, 1.0, 2.0))}),
            (nn.Dropout, sb.Dropout, {"p": pick((0.0, 0.5, 0.75, 1.0))}),
        )
    )
    shape = pick(
        ((), (1,), (7,), (8,), (3, 5), (2, 3, 4), (2, 3, 5, 3), (1, 8, 1, 1), (0, 3, 2, 2), (2, 0, 3))
    )
    return stock, ours, {**options, "inplace": pick((False, False, True))}, shape


def special(values: Tensor, pick: Pick) -> Tensor:
    """Put a few NaN, infinities and negative zeros among the values of one case in three."""
    if values.numel() and pick(range(3)) == 0:
        for _ in range(pick((1, 2, 3))):
            values.view(-1)[pick(range(values.numel()))] = pick(SPECIALS)
    return values


def outcome(layer: nn.Module, x: Tensor, dy_seed: Sequence[int], inplace: bool) -> Any:
    """Everything a layer gives back for one input: (outputs, dx, what x holds afterwards, saved bytes)."""
    torch.manual_seed(dy_seed[0])
    leaf = x.detach().requires_grad_()
    given = leaf * 1 if inplace else leaf
    result, saved = saved_bytes(lambda: layer(given))
    outputs = result if isinstance(result, tuple) else (result,)
    if outputs[0].requires_grad:
        generator = torch.Generator().manual_seed(dy_seed[0])
        outputs[0].backward(torch.randint(-2, 3, outputs[0].shape, generator=generator).to(x.dtype))
    return [[o.detach() for o in outputs], leaf.grad, given.detach(), saved]


def check_drawn_lean(pick: Pick) -> str:
    """Draw one case and compare; returns "refused" or "equal"."""
    stock_type, our_type, options, shape = (draw_pool if pick((True, False)) else draw_activation)(pick)
    x = special(integers(shape, pick(DTYPES), pick, 3), pick)
    if len(shape) == 4:
        x = LAYOUTS[pick(("contiguous", "channels_last", "strided", "sliced"))](x)
    what = f"{stock_type.__name__} {options} on {shape} {x.dtype} strides {x.stride()}"
    inplace, seed = options.get("inplace", False), [pick(range(1 << 16))]
    stock, refusal = attempt(
        lambda: outcome(stock_type(**options), x.clone(memory_format=torch.preserve_format), seed, inplace)
    )
    ours, our_refusal = attempt(
        lambda: outcome(our_type(**options), x.clone(memory_format=torch.preserve_format), seed, inplace)
    )
    assert (refusal is None) == (our_refusal is None), f"{what}: PyTorch {refusal!r}, ours {our_refusal!r}"
    if refusal is not None:
        return "refused"
    for one, two in zip(stock[0], ours[0], strict=True):
        assert_same_bits(two, one, f"{what}: output")
    if issubclass(stock_type, nn.Hardtanh):  # PyTorch's own paths disagree about the gradient at NaN
        stock[1], ours[1] = (grad.masked_fill(x.isnan(), 0) for grad in (stock[1], ours[1]))
    assert_same_bits(ours[1], stock[1], f"{what}: dx")
    assert_same_bits(ours[2], stock[2], f"{what}: the input afterwards")
    assert ours[3] <= max(stock[3], -(-x.numel() // 8)), (
        f"{what}: {ours[3]} bytes kept, PyTorch keeps {stock[3]}"
    )
    return "equal"
