"""Random layer cases: options and shapes, legal and illegal, on small integers.

Small integers make every sum exact in any order and any dtype, so the library must agree with PyTorch bit by bit and
no tolerance is needed. Where PyTorch refuses a case the library must refuse it too: no error may stay silent.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparse_bwd as sb
from benchmarks.masked import compact
from tests.cases import LAYOUTS
from tests.drive import bias_index
from tests.tolerance import assert_same_bits

Pick = Callable[[Sequence[Any]], Any]
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def integers(shape: Sequence[int], dtype: torch.dtype, pick: Pick, largest: int = 1) -> Tensor:
    """A tensor of integers in [-largest, largest]."""
    generator = torch.Generator().manual_seed(pick(range(1 << 16)))
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator).to(dtype)


def draw_conv(pick: Pick) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Constructor arguments of a Conv2d and an input shape; about one in ten is something PyTorch refuses."""
    groups = pick((1, 1, 1, 2, 3, 4))
    kind = pick(("any", "any", "depthwise"))
    c_in = groups * pick((1, 1, 2, 3))
    c_out = groups * pick((1, 2, 3))
    if kind == "depthwise":
        c_in = c_out = groups = pick((1, 2, 5))
    if pick(range(40)) == 0:
        c_in += 1
    options: dict[str, Any] = {
        "in_channels": c_in,
        "out_channels": c_out,
        "kernel_size": pick((1, 1, 2, 3, 3, (1, 3), (3, 2), 5)),
        "stride": pick((1, 1, 1, 2, 3, (2, 1))),
        "padding": pick((0, 0, 1, 1, 2, (0, 2), 4, "same", "valid")),
        "dilation": pick((1, 1, 1, 2, (1, 3))),
        "groups": groups,
        "bias": pick((True, False)),
        "padding_mode": pick(("zeros", "zeros", "zeros", "reflect", "replicate", "circular")),
    }
    size = (pick((1, 2, 3, 5, 8)), pick((1, 2, 4, 7)))
    channels = c_in if pick(range(40)) else c_in + 1
    batch = pick(((2,), (1,), (3,), (), (0,)))
    return options, (*batch, channels, *size)


def draw_linear(pick: Pick) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Constructor arguments of a Linear and an input shape."""
    options = {
        "in_features": pick((1, 2, 3, 7, 16)),
        "out_features": pick((1, 2, 5, 8)),
        "bias": pick((True, False)),
    }
    lead = pick(((), (1,), (4,), (0,), (2, 3), (2, 0), (1, 2, 2), (2, 2, 1, 2)))
    features = options["in_features"] + (pick(range(30)) == 0)
    return options, (*lead, features)


def draw_index(pick: Pick, count: int) -> list[int] | None:
    """Any selection of `count` channels: none, all of them, some, or the whole layer."""
    kind = pick(("none", "whole", "all", "some", "some", "some"))
    if kind == "whole":
        return None
    if kind == "none":
        return []
    return list(range(count)) if kind == "all" else [i for i in range(count) if pick((True, False))]


def attempt(run: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of a call, or the error it raised."""
    try:
        return run(), None
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return None, error


def filled(layer: Any, pick: Pick) -> Any:
    """Give a layer small integer values, and its dtype the drawn one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(parameter.shape, parameter.dtype, pick))
    return layer


def sane(options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> torch.dtype:
    """Steer a drawn convolution clear of what PyTorch 2.14 cannot do on CPU where an image is narrower than the stride.

    With dilation its forward crashes, in bfloat16 its dw is read from beyond the image. Changes `options` in place.
    """
    stride = options["stride"]
    if shape[-1] >= (stride[1] if isinstance(stride, tuple) else stride):
        return dtype
    options["dilation"] = 1
    return torch.float32 if dtype is torch.bfloat16 else dtype


def check_drawn(pick: Pick) -> str:
    """Draw one case and compare; returns "refused", "dead" (nothing to train) or "equal"."""
    conv = pick((True, True, True, False))
    options, shape = draw_conv(pick) if conv else draw_linear(pick)
    dtype = pick(DTYPES)
    if conv:
        dtype = sane(options, shape, dtype)
    stock_type, our_type = (nn.Conv2d, sb.SparseConv2d) if conv else (nn.Linear, sb.SparseLinear)
    stock, refusal = attempt(lambda: stock_type(**options, dtype=dtype))
    ours, our_refusal = attempt(lambda: our_type(**options, dtype=dtype))
    assert (refusal is None) == (our_refusal is None), f"{options}: PyTorch {refusal!r}, ours {our_refusal!r}"
    if refusal is not None:
        return "refused"
    ours.load_state_dict(filled(stock, pick).state_dict())
    axis = pick(("out", "in"))
    count = ours.num_channels(axis)
    index = draw_index(pick, count)
    bias = pick(("selected", "all", "none") if axis == "out" else ("all", "none"))
    ours.set_channels(index, axis=axis, bias=bias)
    x = integers(shape, dtype, pick)
    if len(shape) == 4:
        x = LAYOUTS[pick(("contiguous", "channels_last", "strided", "sliced"))](x)
    return compare(stock, ours, x, index, axis, bias, pick)


def compare(
    stock: Any, ours: Any, x: Tensor, index: list[int] | None, axis: str, bias: str, pick: Pick
) -> str:
    """Run both layers on one input and demand the same bits, or an error from both."""
    what = f"{stock} on {tuple(x.shape)} {x.dtype} strides {x.stride()}, {axis} {index} bias {bias}"
    needs_x = pick((True, True, False))
    one, two = x.detach().requires_grad_(), x.detach().requires_grad_(needs_x)
    y, refusal = attempt(lambda: stock(one))
    our_y, our_refusal = attempt(lambda: ours(two))
    assert (refusal is None) == (our_refusal is None), f"{what}: PyTorch {refusal!r}, ours {our_refusal!r}"
    if refusal is not None:
        return "refused"
    assert_same_bits(our_y.detach(), y.detach(), f"{what}: y")
    dy = integers(y.shape, y.dtype, pick)
    _, refusal = attempt(lambda: y.backward(dy))
    trained = bias_index(ours, index, bias) != [] or index != []
    assert our_y.requires_grad == (needs_x or trained), what
    if not our_y.requires_grad:
        return "dead"
    _, our_refusal = attempt(lambda: our_y.backward(dy))
    assert (refusal is None) == (our_refusal is None), f"{what}: PyTorch {refusal!r}, ours {our_refusal!r}"
    if refusal is not None:
        return "refused"
    assert_same_bits(two.grad, one.grad if needs_x else None, f"{what}: dx")
    rows, shift = ours.trainable_weight, ours.trainable_bias
    dw = None if index == [] else compact(stock.weight.grad, stock, index, axis)
    assert_same_bits(None if rows is None else rows.grad, dw, f"{what}: dw")
    places = bias_index(ours, index, bias)
    db = None if places == [] else stock.bias.grad if places is None else stock.bias.grad[places]
    assert_same_bits(None if shift is None else shift.grad, db, f"{what}: db")
    return "equal"
