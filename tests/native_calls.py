"""One sample call of every operator that the native CPU library serves, and what a call gives.

Shared by the tests that want all of them: same bits at any thread count, in deterministic mode, on every
instruction set, and as plain PyTorch gives them.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import backend, bits
from tests.cases import LAYOUTS

OPS = torch.ops.sparse_bwd
Call = tuple[str, tuple[Any, ...]]
# Instruction sets that csrc/cpu knows; a processor has some of them.
INSTRUCTIONS = ("avx512", "avx2", "neon", "portable")
ACTS = (("none", 0.0, 0.0), ("relu", 0.0, 0.0), ("hardtanh", -1.0, 2.0), ("leaky_relu", 0.25, 0.0))

needs_native = pytest.mark.skipif(bool(backend.missing("cpu")), reason=f"cpu: {backend.missing('cpu')}")


def choose(name: str) -> str:
    """Let the CPU kernels of one instruction set serve ("" = the widest), and say which serve now."""
    chosen: str = backend.native("use_cpu_kernels")(name)
    return chosen


def why_not(name: str) -> str:
    """Why the kernels of an instruction set cannot serve here; "" where they can."""
    if backend.missing("cpu"):
        return backend.missing("cpu")
    try:
        choose(name)
    except ValueError as error:
        return str(error)
    choose("")
    return ""


WHY_NOT = {name: why_not(name) for name in INSTRUCTIONS}
# What the tests run on: each set of this processor; without a library one that is skipped.
USABLE = [name for name, reason in WHY_NOT.items() if not reason] or ["portable"]


def integers(*shape: int, largest: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, of which sums are exact in every dtype and order (bfloat16: up to 256)."""
    return torch.randint(-largest, largest + 1, shape).to(dtype)


def calls(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """One call of every operator on tensors [N, C, H, W] of small integers; H and W at least 2."""
    n, c, h, w = shape

    def x(*sizes: int, largest: int = 2) -> Tensor:
        return LAYOUTS[layout](integers(*sizes, largest=largest, dtype=dtype))

    scale, shift = integers(c).float(), integers(c).float()
    for act in ACTS:
        yield "affine_act", (x(*shape), scale, shift, *act, True)
        yield "affine_act_", (x(*shape), scale, shift, *act, True)
        yield "affine_act_", (x(*shape), None, None, *act, False)
        flags = torch.randint(0, 256, (bits.packed_size(n * c * h * w),), dtype=torch.uint8)
        mask, strides = None if act[0] == "none" else flags, x(*shape).stride()
        yield "affine_act_dx", (x(*shape, largest=1), scale, mask, act[0], act[1], strides, False)
        yield "affine_act_dx", (x(*shape, largest=1), scale, mask, act[0], act[1], strides, True)
    window = ([2, 2], [1, 2], [1, 0], [1, 1], False)
    y, offset = OPS.max_pool2d(x(*shape), *window)
    yield "max_pool2d", (x(*shape), *window)
    yield "max_pool2d_dx", (x(*y.shape), offset, list(shape), *window)
    for rows, taps in ((None, 3), (torch.arange(0, c, 2), 1)):
        count = c if rows is None else rows.numel()
        kept = x(n, count, h, w, largest=1)
        dy = x(n, c, h + taps - 1, w + taps - 1, largest=1)
        if count > 1:
            yield "conv2d_dw", (
                kept, dy, None, rows, None, [count, 1, taps, taps], [1, 1], [taps - 1] * 4, "zeros", [1, 1], count,
                False,
            )  # fmt: skip
    # Few channels, which our kernel multiplies: the bits of PyTorch's product depend on the number of threads.
    pixels, thin, wide = n * h * w, min(c, 16), c + 5
    for rows in (None, torch.arange(0, wide, 3)):
        given, dy = (integers(pixels, size, largest=1, dtype=dtype) for size in (thin, wide))
        yield "linear_dw", (given, dy, rows, False)
    yield "response", (x(*shape), x(*shape), None)
    yield "response", (x(*shape), x(n, len(range(0, c, 2)), h, w), torch.arange(0, c, 2))
    yield "response_sketch", (x(*shape), integers(c, 5).double(), 2**40 + 3, 2**32 - 20)
    yield "norm_affine", (shift, scale.abs() + 1, scale, None, 0.0)
    yield (
        "write_back",
        ([x(c, 5, 3, 3)], [x(len(range(0, c, 2)), 5, 3, 3)], [torch.arange(0, c, 2)], [0], [1]),
    )


def outcome(call: Call) -> list[Tensor]:
    """The results of a call and what it wrote into its arguments, which stay as they were."""
    name, arguments = call
    operator = getattr(OPS, name).default
    written, given = [], []
    for argument, value in zip(operator._schema.arguments, arguments, strict=True):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = [t.clone() for t in value] if isinstance(value, list) else value.clone()
            written += value if isinstance(value, list) else [value]
        given.append(value)
    result = operator(*given)
    results = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    return results + written
