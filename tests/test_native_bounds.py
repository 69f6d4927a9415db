"""The native CPU kernels at the bounds of their tensors: nothing is written outside, and what is far is reached."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_bwd.ops import reference
from sparse_bwd.ops.backend import forced, native
from tests.cases import LAYOUTS
from tests.native_calls import OPS, integers, needs_native
from tests.tolerance import assert_same_bits

DENSE = ["contiguous", "channels_last"]


@needs_native
def test_write_back_between_memory_formats() -> None:
    """Weights and slices in any two formats, and kernels of one column, whose strides do not tell the format."""
    narrow = integers(6, 4, 1, 3, largest=100).transpose(2, 3)
    assert narrow.is_contiguous() and narrow.stride(3) == 3
    index = torch.tensor([0, 3, 5]), torch.tensor([0, 3])
    for full in (integers(6, 4, 3, 2, largest=100), narrow, integers(6, 4, 1, 1), integers(6, 1, 3, 3)):
        for dim in (0, 1) if full.shape[1] > 1 else (0,):
            part = integers(*full.index_select(dim, index[dim]).shape, largest=100)
            expected = reference.write_back_ref(full, part, index[dim], dim, 1)
            for one in DENSE:
                for two in DENSE:
                    held = LAYOUTS[one](full.clone(memory_format=torch.preserve_format))
                    with forced("native"):
                        OPS.write_back([held], [LAYOUTS[two](part)], [index[dim]], [dim], [1])
                    assert_same_bits(held, expected, f"dim {dim}: {two} into {one}")


@needs_native
@pytest.mark.parametrize("dim,groups", [(0, 1), (1, 1), (1, 2)])
@pytest.mark.parametrize("wrong", [-1, 8, 2**40])
def test_write_back_never_writes_outside_the_weight(wrong: int, dim: int, groups: int) -> None:
    full = integers(8, 8 // groups, 2, 2)
    part = torch.ones(2, 8, 2, 2).transpose(0, dim).contiguous() if groups == 1 else torch.ones(2, 4, 2, 2)
    held = full.clone()
    with (
        pytest.raises(ValueError, match="an index names a channel that the weight does not have"),
        forced("native"),
    ):
        OPS.write_back([held], [part], [torch.tensor([0, wrong])], [dim], [groups])
    assert_same_bits(held, full, "a refused call writes nothing")


@needs_native
def test_write_back_refuses_slices_that_do_not_fit() -> None:
    full, index = [torch.zeros(4, 3)], [torch.tensor([0, 2])]
    with forced("native"):
        for part in (torch.ones(3, 3), torch.ones(1, 3), torch.ones(2, 2)):
            with pytest.raises(ValueError, match="a slice must hold the values of its channels"):
                OPS.write_back(full, [part], index, [0], [1])
        with pytest.raises(ValueError, match="an index must be contiguous int64"):
            OPS.write_back(full, [torch.ones(2, 3)], [index[0].int()], [0], [1])
        with pytest.raises(NotImplementedError):
            OPS.write_back([full[0].half()], [torch.ones(2, 3).bfloat16()], index, [0], [1])
    assert full[0].count_nonzero() == 0


HUGE = (1, 2, (1 << 14) + 8, 1 << 16)  # a little more than 2^31 elements


def test_results_of_huge_tensors_have_the_right_sizes() -> None:
    x = torch.empty(HUGE, device="meta", dtype=torch.bfloat16)
    count = x.numel()
    assert count > 2**31
    y, mask = OPS.affine_act(x, None, None, "relu", 0.0, 0.0, True)
    assert y.shape == x.shape and mask.numel() == -(-count // 8)
    y, offset = OPS.max_pool2d(x, [2, 2], [1, 1], [0, 0], [1, 1], False)
    assert y.shape == offset.shape == (1, 2, HUGE[2] - 1, HUGE[3] - 1)
    assert OPS.max_pool2d_dx(y, offset, list(HUGE), [2, 2], [1, 1], [0, 0], [1, 1], False).shape == x.shape
    assert OPS.response(x, x).shape == (3, 1, 2)
    OPS.response_sketch(x, torch.empty(2, 16, device="meta", dtype=torch.float64), 0, 0)


@needs_native
@pytest.mark.parametrize("layout", DENSE)
def test_positions_past_two_to_the_31_are_reached(layout: str, tmp_path: Path) -> None:
    """On a file that is one hole but for a few values, so that 4 GiB cost a few pages."""
    n, c, h, w = HUGE
    flat = torch.from_file(str(tmp_path / "hole"), shared=True, size=n * c * h * w, dtype=torch.bfloat16)
    x = flat.view(HUGE) if layout == "contiguous" else flat.view(n, h, w, c).permute(0, 3, 1, 2)
    step = [4098, 1 << 14]
    points = x[:, :, :: step[0], :: step[1]]
    points.copy_(integers(*points.shape, largest=100))
    expected = points.clone()
    assert points.shape == (1, 2, 4, 4)
    with forced("native"):
        y, offset = OPS.max_pool2d(x, [1, 1], step, [0, 0], [1, 1], False)
        dy = LAYOUTS[layout](integers(*points.shape, largest=1, dtype=torch.bfloat16))
        size = [2, 1, 1, 1]
        dw = OPS.conv2d_dw(x, dy, None, None, None, size, step, [0] * 4, "zeros", [1, 1], 2, False)
    assert_same_bits(y, expected)
    assert offset.count_nonzero() == 0
    assert_same_bits(dw.flatten(), (expected.float() * dy.float()).sum((0, 2, 3)).bfloat16())


F32, BYTES = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
SMALL, OFFSETS, VECTOR = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2, dtype=torch.uint8), torch.zeros(2)
ROW, SUMS = torch.zeros(1, 2, 1, 1), torch.zeros(3, 1, 2, dtype=torch.float64)
POOL = ([2, 2], [2, 2], [0, 0], [1, 1], False)
Call = tuple[str, tuple[Any, ...]]


def affine(
    y: Tensor, mask: Tensor | None, x: Tensor, scale: Tensor | None, shift: Tensor | None, act: int = 0
) -> Call:
    return "affine_act", (y, mask, x, scale, shift, 16, act, 0.0, 0.0)


def affine_dx(dx: Tensor, dshift: Tensor | None, dy: Tensor) -> Call:
    return "affine_act_dx", (dx, dshift, dy, None, None, 2, 16, 0, 0.0)


def conv(
    dw: Tensor, dy: Tensor, rows: list[int] | None, groups: int = 1, dtype: torch.dtype = torch.int64
) -> Call:
    index = None if rows is None else torch.tensor(rows, dtype=dtype)
    return "conv2d_dw", (dw, F32, dy, index, [1, 1], [0, 0], [1, 1], groups, False)


REFUSED: list[tuple[Call, str]] = [
    (affine(SMALL, None, F32, None, None), "x and y must have one size and type"),
    (affine(F32.bfloat16(), None, F32, None, None), "x and y must have one size and type"),
    (affine(F32.double(), None, F32.double(), None, None), "values must be float32 or bfloat16"),
    (affine(F32, BYTES[0, 0, 0, :3], F32, None, None, 1), "the mask must hold one bit per element"),
    (affine(F32, None, F32, VECTOR, None), "scale and shift come together"),
    (
        affine(F32, None, F32, VECTOR.double(), VECTOR.double()),
        "scale and shift must be contiguous float32 vectors",
    ),
    (affine_dx(SMALL, None, F32), "dx and dy must have one size and type"),
    (affine_dx(F32, VECTOR[:1], F32), "dshift must be float32 with one value per channel"),
    (("max_pool2d", (SMALL, BYTES, F32, *POOL)), "y and offset must have one size"),
    (("max_pool2d", (SMALL, OFFSETS, F32[:, :1], *POOL)), "x and y must have the same channels"),
    (("max_pool2d", (SMALL, OFFSETS, F32, [17, 17], *POOL[1:])), "windows must have at most 256 elements"),
    (("max_pool2d", (SMALL, OFFSETS, F32, *POOL[:2], [2, 2], *POOL[3:])), "of which one lies in the image"),
    (
        ("max_pool2d", (SMALL, OFFSETS, F32, [2], *POOL[1:])),
        "kernel, stride, padding and dilation must be pairs",
    ),
    (("max_pool2d", (F32, BYTES, SMALL, *POOL)), "every window must begin inside the image"),
    (("max_pool2d_dx", (SMALL, F32, BYTES, *POOL)), "every window must begin inside the image"),
    (("max_pool2d_dx", (F32[:, :1], SMALL, OFFSETS, *POOL)), "dx and dy must have the same channels"),
    (conv(ROW, F32, [2]), "rows name a channel that dy does not have"),
    (conv(ROW, F32, [-1]), "rows name a channel that dy does not have"),
    (conv(ROW, F32, [1], dtype=torch.int32), "rows must be contiguous int64"),
    (conv(ROW, F32, None), "dw must have one row per selected channel"),
    (conv(ROW.view(2, 1, 1, 1), F32, None, groups=0), "dw must have one row per selected channel"),
    (conv(ROW.view(2, 1, 1, 1), F32, None), "x must have the input channels of every group"),
    (conv(torch.zeros(2, 2, 1, 1), F32.bfloat16(), None), "x, dy and dw must have one type"),
    (conv(torch.zeros(2, 2, 1, 1), F32[:0], None), r"tensors must be \[N, C, H, W\] of one batch"),
    (("response", (SUMS, SMALL, F32, False)), "new and previous must have one size"),
    (("response", (SUMS.float(), F32, F32, False)), r"sums must be float64 \[3, N, C\]"),
    (("response_sketch", (SUMS[0], SMALL, 0, 0, False)), r"sums must be contiguous float64 \[C, r\]"),
    (("response_sketch", (SUMS[0].float(), SMALL, 0, 0, False)), r"sums must be contiguous float64 \[C, r\]"),
    (("response_sketch", (SUMS[0].view(2, 1), SMALL, 0, -1, False)), "places are counted from 0"),
    (
        ("norm_affine", (VECTOR, VECTOR, VECTOR, VECTOR[:1], None, None, 0.0)),
        "contiguous float32 of one length",
    ),
]


@needs_native
@pytest.mark.parametrize(
    "call,sentence", REFUSED, ids=[f"{call[0]}-{sentence}" for call, sentence in REFUSED]
)
def test_kernels_refuse_tensors_that_do_not_fit(call: Call, sentence: str) -> None:
    """The operators of the native library themselves, which sparse_bwd.ops calls with results that it allocated."""
    with pytest.raises(ValueError, match=f"sparse_bwd_native: .*{sentence}"):
        native(call[0])(*call[1])
