"""What the CUDA bindings refuse, and in which words; tried on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .emulated import COMPILER, Emulated, emulated

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture
def ops() -> Emulated:
    return emulated()


def bits(count: int) -> Tensor:
    return torch.zeros((count + 7) // 8, dtype=torch.uint8)


def test_affine_act_refuses(ops: Emulated) -> None:
    x, vector = torch.ones(2, 3, 4, 5), torch.ones(3)
    last = x.contiguous(memory_format=torch.channels_last)
    for words, arguments in {
        "one size, order and type": (last, None, x, None, None, 20, 1, 0.0, 0.0),
        "float32, float16 or bfloat16": (x.double(), None, x.double(), None, None, 20, 1, 0.0, 0.0),
        "one bit per element": (x, bits(121), x, None, None, 20, 1, 0.0, 0.0),
        "come together": (x, None, x, vector, None, 20, 1, 0.0, 0.0),
        "whole planes of all channels": (x, None, x, vector, vector, 7, 1, 0.0, 0.0),
        "one value per channel": (x, None, x, vector, torch.ones(4), 20, 1, 0.0, 0.0),
        "act must be": (x, None, x, None, None, 20, 4, 0.0, 0.0),
    }.items():
        with pytest.raises(ValueError, match=words):
            ops.affine_act(*arguments)
    for words, arguments in {
        "dx and dy must have": (last, None, x, None, None, 3, 20, 1, 0.0),
        "dshift must be": (x, torch.ones(4), x, None, None, 3, 20, 1, 0.0),
        "float32 with one value": (x, None, x, vector.double(), None, 3, 20, 1, 0.0),
    }.items():
        with pytest.raises(ValueError, match=words):
            ops.affine_act_dx(*arguments)


def test_conv2d_dw_refuses(ops: Emulated) -> None:
    x, dw = torch.ones(2, 3, 6, 6), torch.ones(3, 1, 3, 3)
    one, zero, index = [1, 1], [0, 0], torch.arange(2)
    for words, arguments in {
        "depthwise": (torch.ones(3, 3, 3, 3), x, x, None, one, one, one, 3, False),
        "one entry of rows": (dw, x, x, index, one, one, one, 3, False),
        "rows must be": (dw, x, x, torch.arange(3).int(), one, one, one, 3, False),
        "NCHW or all in channels_last": (dw, x, x, None, one, one, one, 3, True),
        "must have one type": (dw.half(), x, x, None, one, one, one, 3, False),
        "must be pairs": (dw, x, x, None, [1], one, one, 3, False),
        "must be positive": (dw, x, x, None, zero, one, one, 3, False),
        "start inside": (dw, x, x, None, [2, 2], one, one, 3, False),
        "shorter than": (dw, x, x, None, one, one, [1 << 29, 1], 3, False),
        "fewer than 2\\*\\*31 elements": (dw, x, x, None, one, [1 << 15, 1 << 15], one, 3, False),
    }.items():
        with pytest.raises(ValueError, match=words):
            ops.conv2d_dw(*arguments)


def test_max_pool2d_refuses(ops: Emulated) -> None:
    x, y = torch.ones(2, 3, 6, 6), torch.ones(2, 3, 3, 3)
    offset, two, zero, one = y.byte(), [2, 2], [0, 0], [1, 1]
    for words, arguments in {
        "one number of channels": (y[:, :2].clone(), offset[:, :2].clone(), x, two, two, zero, one, False),
        "offset must be": (y, y.int(), x, two, two, zero, one, False),
        "up to 256 positions": (y, offset, x, [16, 17], two, zero, one, False),
    }.items():
        with pytest.raises(ValueError, match=words):
            ops.max_pool2d(*arguments)


def test_response_refuses(ops: Emulated) -> None:
    new, sums = torch.ones(2, 3, 4, 4), torch.ones(3, 2, 3, dtype=torch.float64)
    for words, arguments in {
        "one size": (sums, new[:, :2], new, False),
        "order that channels_last names": (sums, new, new, True),
        "sums must be": (sums.float(), new, new, False),
        "float32, float16 or bfloat16": (sums, new.int(), new, False),
    }.items():
        with pytest.raises(ValueError, match=words):
            ops.response(*arguments)
